"""The runs of a runs folder, looked at from outside: which is meant, how it stands, and how to stop it."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.errors import JobError, Problem, RunFailed, did_you_mean
from ..core.processes import Process
from ..tracking.journal import last_row, plain
from .live import FILE
from .rundir import Record, newest_run

Standing = Literal["running", "finished", "stopped", "failed", "died"]

_TRACKERS = 90.0  # seconds that the end of a run may take beside the ranks' own: trackers, the report, the weights
_AT_ONCE = 30.0
_POLL = 0.1
_SEPARATE = 0.4  # seconds between two signals that are to count as two requests
_UNHEARD = 5.0  # seconds without a word of the first after which the second is sent all the same


@dataclass(frozen=True)
class RunStatus:
    """How a run stands. What is not known is 0, empty or None.

    Attributes:
        run: its directory.
        name: ``<job>/<number>``.
        state: "died": it was running, and its driver is gone without a word.
        phase: what the driver waits for, where that is not the ranks.
        step: completed optimizer steps (of a script: the highest that it has logged).
        nodes: names of the machines, by node.
        metrics: the last row of the metrics.
        checkpoint: step of the newest checkpoint that this launch has loaded or saved.
        checkpoint_cost: of the newest that it has saved: ``stall_seconds`` that training waited for it,
            ``durable_seconds`` until it was complete, and the ``bytes`` of its tensors.
        generation: the number of the last start of the ranks.
        restarts: how often the last launch has started them again.
        ranks: of a running run, each living rank's node, process, step, phase, and seconds there; of a dead one,
            the last known.
        goodput: share of the last launch's wall time spent in optimizer steps.
        seconds: where the last launch's time went.
        stragglers: ranks that are notably slower than the median, by how much as a share of it.
        stop_requests: how often it was asked to stop.
        stop_grace: seconds that the ranks get to end then.
        heard: seconds since the driver wrote this.
        host: machine of the driver.
        pid: its process there.
        here: whether that is this machine.
    """

    run: Path
    name: str
    state: Standing
    phase: str
    step: int
    total_steps: int
    world: int
    nodes: tuple[str, ...]
    metrics: Mapping[str, Any]
    checkpoint: int | None
    checkpoint_cost: Mapping[str, float]
    generation: int
    restarts: int
    ranks: tuple[Mapping[str, Any], ...]
    goodput: float
    seconds: Mapping[str, float]
    stragglers: Mapping[str, float]
    stop_requests: int
    stop_grace: float
    heard: float | None
    host: str
    pid: int
    here: bool

    def to_json(self) -> dict[str, Any]:
        """Strict JSON, numbers that it does not have as in the metrics file."""
        return {
            **asdict(self),
            "run": str(self.run),
            "metrics": {name: plain(value) for name, value in self.metrics.items()},
        }


def find_run(runs: Path, word: str | None) -> Path:
    """The run directory that ``word`` means: its path, or in the folder ``runs`` a name or ``name/number``.

    A name alone is its newest run; no word at all is the run that was launched last.

    Raises:
        JobError: there is none.
    """
    if word is None:
        newest = max(all_runs(runs), key=launched, default=None)
        if newest is None:
            hint = "say which folder with --run-dir, or name a run"
            raise JobError(Problem(f"there is no run in {runs}", hint=hint))
        return newest
    for path in (Path(word), runs / word):
        if (path / "run.json").is_file():
            return path.resolve()
        if path.is_dir() and (newest := newest_run(path.parent, path.absolute().name)) is not None:
            return newest
    name, _, number = word.rpartition("/")
    same = [
        run for run in all_runs(runs) if number.isdecimal() and (run.parent.name, int(run.name)) == (name, int(number))
    ]
    if same:
        return same[0]
    known = [f"{run.parent.name}/{run.name}" for run in all_runs(runs)]
    hint = did_you_mean(word, {*known, *(name.partition("/")[0] for name in known)})
    raise JobError(Problem(f"there is no run '{word}' in {runs}", hint=hint))


def all_runs(runs: Path) -> Iterator[Path]:
    """Every run directory of a runs folder."""
    for path in runs.absolute().glob("*/*/run.json"):
        if path.parent.name.isdecimal():
            yield path.parent


def launched(run: Path) -> tuple[float, str]:
    """Unix time in seconds of the run's last launch, and its number."""
    record = Record.read(run)
    if record is None:
        return 0.0, run.name
    return record.driver.since if record.driver else record.started, run.name


def look(run: Path) -> RunStatus:
    """How the run stands now.

    Raises:
        JobError: its record is damaged.
    """
    record = Record.read(run)
    if record is None:
        raise JobError(Problem(f"{run / 'run.json'} is damaged"))
    facts = _facts(run)
    ranks = tuple(facts.get("ranks", ()))
    state = standing(record)
    row = last_row(run / "metrics.jsonl")
    logged = [] if record.job else [rank["step"] for rank in ranks]
    driver = record.driver
    nodes = tuple(facts.get("nodes", ()))
    return RunStatus(
        run=run,
        name=f"{record.name}/{run.name}",
        state=state,
        phase=facts.get("phase", "") if state == "running" else "",
        step=max(record.step, row.step if row else 0, *logged),
        total_steps=facts.get("total_steps", 0),
        world=len(nodes) * facts.get("ranks_per_node", 0),
        nodes=nodes,
        metrics=dict(row.metrics) if row else {},
        checkpoint=facts.get("checkpoint"),
        checkpoint_cost=facts.get("checkpoint_cost", {}),
        generation=record.generations - 1,
        restarts=facts.get("restarts", 0),
        ranks=ranks if state in ("running", "died") else (),
        goodput=facts.get("goodput", 0.0),
        seconds=facts.get("seconds", {}),
        stragglers=facts.get("stragglers", {}),
        stop_requests=facts.get("stop_requests", 0),
        stop_grace=facts.get("stop_grace", 0.0),
        heard=max(0.0, time.time() - facts["at"]) if facts else None,
        host=driver.host if driver else "",
        pid=driver.process.pid if driver else 0,
        here=driver is not None and driver.is_here,
    )


def standing(record: Record) -> Standing:
    """The state of a run, its driver's life considered where this machine can see it."""
    if record.state != "running":
        return record.state
    return "died" if record.driver is None or record.driver.gone else "running"


def _facts(run: Path) -> dict[str, Any]:
    """What the present driver of the run wrote last; empty where it has not."""
    record = Record.read(run)
    since = record.driver.since if record and record.driver else 0.0
    try:
        facts: dict[str, Any] = json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if facts["at"] >= since else {}


class _Requests:
    """Asks a driver to stop until it has counted as many requests as are wanted.

    Two signals that it takes in at once count as one, and on a busy machine it takes them in late, so the second waits
    until the first was counted. A single request is never repeated, since the second would be another one.
    """

    def __init__(self, process: Process, *, wanted: int, counted: int) -> None:
        self._process, self._wanted, self._counted = process, wanted, counted
        self._due = -math.inf if counted < wanted else math.inf

    def send_due(self, counted: int) -> None:
        """Send the next request if it is time to; ``counted`` is how many the driver says that it has had."""
        now = time.monotonic()
        if counted > self._counted:
            self._counted = counted
            self._due = now + _SEPARATE if counted < self._wanted else math.inf
        if now >= self._due:
            self._process.signal(signal.SIGINT)
            self._due = now + _UNHEARD if self._wanted > 1 else math.inf


def stop_run(run: Path, *, now: bool, say: Callable[[str], None]) -> RunStatus:
    """Have a run stop as its Ctrl-C does, ``now`` as the second one does, and wait until it has; how it then stands.

    Nothing happens to a run that is not running. One that has been asked already is not asked again, but waited for.

    Raises:
        JobError: its driver is on another machine, or another user's.
        RunFailed: it did not end in time.
    """
    status = look(run)
    record = Record.read(run)
    if status.state != "running" or record is None or record.driver is None:
        return status
    if not status.here:
        what = f"{status.name} is driven by process {status.pid} on {status.host}, which is not this machine"
        raise JobError(Problem(what, hint=f"on {status.host}: dltrain stop {run}{' --now' if now else ''}"))
    process = record.driver.process
    if process.foreign:
        raise JobError(Problem(f"{status.name} is driven by process {status.pid}, which is another user's"))
    limit = _AT_ONCE if now else status.stop_grace + _TRACKERS
    aim = "to end at once" if now else "to save a checkpoint and end" if record.job else "to end"
    say(f"waiting for {status.name} {aim} (at most {limit:g} s)")
    requests = _Requests(process, wanted=2 if now else 1, counted=status.stop_requests)
    deadline = time.monotonic() + limit
    said = ""
    while process.alive:
        if time.monotonic() > deadline:
            raise RunFailed(_stuck(status, process.state, limit, now=now))
        facts = _facts(run)
        requests.send_due(int(facts.get("stop_requests", 0)))
        phase = str(facts.get("phase", ""))
        if phase and phase != said:
            said = phase
            say(f"  {phase}")
        time.sleep(_POLL)
    return look(run)


def _stuck(status: RunStatus, state: str, limit: float, *, now: bool) -> str:
    words = f"{status.name} has not ended within {limit:g} s"
    if state == "T":
        return f"{words}: its driver, process {status.pid}, is stopped; kill -CONT {status.pid} lets it go on"
    further = f"kill -KILL {status.pid} ends its driver, and ranks end with it" if now else "--now ends it at once"
    return f"{words}; {further}"
