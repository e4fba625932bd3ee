"""``dltrain status``, ``logs`` and ``stop``: runs looked at, and ended, from another shell."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import JobError, Problem, RunFailed
from ..core.streams import lead_nowhere
from ..launcher.logs import Logs, Pick
from ..launcher.runs import RunStatus, all_runs, launched, look, stop_run
from ..launcher.submit.adapter import OVER, Adapter, JobState
from ..launcher.submit.elsewhere import cluster_at, find_in, names_job, run_seen
from ..launcher.submit.handle import Handle
from ..launcher.submit.handles import all_handles, resolve, run_of
from ..launcher.submit.jobs import output_of, state_of, stop_job
from ..launcher.view import duration
from .render import columns
from .summary import shown


@dataclass(frozen=True)
class Where:
    """Where runs and jobs are looked for: in a runs folder, or at a cluster that knows its jobs itself."""

    runs: Path
    cluster: Adapter | None = None

    @classmethod
    def of(cls, runs: str, address: str | None, cluster: str | None) -> Where:
        """From the options of a command.

        Raises:
            JobError: there is no such cluster.
        """
        return cls(Path(runs), cluster_at(address, cluster))

    def find(self, word: str | None) -> tuple[Path | None, Handle | None]:
        """What a word means: a run directory, the submitted job that drives it, or both.

        Raises:
            JobError: neither.
            RunFailed: the cluster does not answer.
        """
        if self.cluster is None:
            return resolve(self.runs, word)
        handle = find_in(self.cluster, word)
        return run_seen(handle), handle

    def run_of(self, handle: Handle) -> Path | None:
        """The run directory of a job, where it can be seen from here."""
        return run_of(self.runs, handle) if self.cluster is None else run_seen(handle)


_CODES = {"running": 0, "finished": 0, "queued": 0, "failed": 1, "died": 1, "unknown": 1, "stopped": 3}


def show_status(run: str | None, where: Where, *, as_json: bool) -> int:
    """Print how a run stands; 0 if it is running or finished, 1 if it failed or died, 3 if it is stopped.

    Raises:
        JobError: there is no such run.
    """
    path, handle = where.find(run)
    job = _job(handle) if handle else None
    if path is None:
        assert handle is not None
        assert job is not None
        return _show_job(handle, job, as_json=as_json)
    status = look(path)
    if status.state == "running" and job is not None and job.standing in OVER:
        status = replace(status, state="died")  # where its driver ran cannot be seen from here
    if as_json:
        more = {"job": _job_json(handle, job)} if handle and job else {}
        sys.stdout.write(json.dumps(status.to_json() | more, indent=2) + "\n")
    else:
        rows = _rows(status) + ([("job", f"{handle.kind} {handle.id}, {job}")] if handle and job else [])
        width = max(len(name) for name, _ in rows)
        sys.stdout.write("".join(f"{name:<{width}}  {text}\n" for name, text in rows))
    return _CODES[status.state]


def _rows(status: RunStatus) -> list[tuple[str, str]]:
    state = {"died": "died: its driver is gone without a word"}.get(status.state, status.state)
    if status.state == "running" and status.stop_requests:
        state += ", asked to stop"
    rows = [(status.name, state + (f" ({status.phase})" if status.phase else ""))]
    rows.append(("step", f"{status.step} of {status.total_steps}" if status.total_steps else str(status.step)))
    losses = [f"{name} {value:.4g}" for name, value in status.metrics.items() if _is_loss(name, value)]
    if losses:
        rows.append(("loss", "  ".join(losses)))
    if status.world:
        count = f"{len(status.nodes)} node{'s' if len(status.nodes) > 1 else ''}"
        nodes = f"{count}: {', '.join(dict.fromkeys(status.nodes))}"
        rows.append(("ranks", f"{status.world} on {nodes}"))
    rows += [(f"  rank {r['rank']}", _place(r)) for r in status.ranks]
    restarts = f", {status.restarts} restarts since the last launch" if status.restarts else ""
    rows.append(("generation", f"{status.generation}{restarts}" if status.generation >= 0 else "none yet"))
    if status.checkpoint is not None:
        rows.append(("checkpoint", f"step {status.checkpoint}"))
    if status.seconds:
        spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in status.seconds.items())
        rows.append(("goodput", f"{status.goodput:.0%} ({spent})"))
    for rank, slower in status.stragglers.items():
        rows.append(("slow", f"rank {rank}: {slower:.0%} slower than the median"))
    if status.pid:
        heard = f", heard of {duration(status.heard)} ago" if status.heard is not None else ""
        living = heard if status.state == "running" else ""
        rows.append(("driver", f"process {status.pid} on {status.host}{living}"))
    rows.append(("run", str(shown(status.run))))
    return rows


def _job(handle: Handle) -> JobState:
    """How a submitted job stands, also where its cluster cannot be asked from here."""
    try:
        return state_of(handle)
    except RunFailed as error:
        return JobState("unknown", str(error))


def _job_json(handle: Handle, job: JobState) -> dict[str, Any]:
    return {"kind": handle.kind, "id": handle.id, "state": job.standing, "words": job.words}


def _show_job(handle: Handle, job: JobState, *, as_json: bool) -> int:
    """Print how a submitted job stands that has no run directory that could be seen from here."""
    if as_json:
        answer = {"name": handle.name, "state": job.standing, "job": _job_json(handle, job)}
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    else:
        _say(f"{handle.name}/{handle.key}  {job}")
    return _CODES[job.standing]


def show_runs(where: Where, *, as_json: bool) -> int:
    """Print all runs and submitted jobs of a runs folder, or all jobs of a cluster, the newest first.

    Raises:
        JobError: there is no such cluster.
        RunFailed: it does not answer.
    """
    listed = _listed_here(where.runs) if where.cluster is None else _listed_there(where.cluster)
    listed.sort(key=lambda row: row["since"], reverse=True)
    if as_json:
        sys.stdout.write(json.dumps(listed, indent=2) + "\n")
    elif listed:
        times = [
            time.strftime("%Y-%m-%d %H:%M", time.localtime(row["since"])) if row["since"] else "-" for row in listed
        ]
        rows = [[r["name"], r["state"], str(r["step"]), when, r["job"]] for r, when in zip(listed, times, strict=True)]
        sys.stdout.write(columns([["run", "state", "step", "launched", "job"], *rows], right={2}))
    elif where.cluster is None:
        _say(f"there are no runs in {where.runs}")
    else:
        _say("the cluster knows no job of dltrain")
    return 0


def _listed_there(cluster: Adapter) -> list[dict[str, Any]]:
    """The jobs of a cluster, by their runs where these are seen from here."""
    listed: list[dict[str, Any]] = []
    for handle, job in cluster.jobs():
        row = {"name": f"{handle.name}/{handle.key}", "state": job.standing, "step": 0}
        path = run_seen(handle)
        if path is not None:
            run = _of_run(path)
            row |= {"name": run["name"], "step": run["step"]}
        listed.append(row | {"since": handle.submitted, "job": handle.key})
    return listed


def _listed_here(runs: Path) -> list[dict[str, Any]]:
    """The runs of a runs folder, and the submitted jobs that have none yet."""
    listed: list[dict[str, Any]] = []
    handles = list(all_handles(runs))
    begun = {run_of(runs, handle): handle for handle in handles}
    for path in all_runs(runs):
        handle = begun.get(path)
        listed.append(_of_run(path) | {"job": handle.key if handle else ""})
    for handle in handles:
        if run_of(runs, handle) is None and (state := _job(handle).standing) not in ("finished", "stopped"):
            row = {"name": f"{handle.name}/{handle.key}", "state": state, "step": 0}
            listed.append(row | {"since": handle.submitted, "job": handle.key})
    return listed


def _of_run(path: Path) -> dict[str, Any]:
    """What a list says of a run, also of one whose record cannot be read."""
    try:
        status = look(path)
    except JobError:
        return {"name": f"{path.parent.name}/{path.name}", "state": "damaged", "step": 0, "since": 0.0}
    return {"name": status.name, "state": status.state, "step": status.step, "since": launched(path)[0]}


def _is_loss(name: str, value: object) -> bool:
    return name.endswith("loss") and isinstance(value, (int, float))


def _place(rank: Mapping[str, Any]) -> str:
    step = f"step {rank['step']}" if rank["step"] >= 0 else "before the first step"
    return f"node {rank['node']}, {step}, in {rank['phase']} for {rank['seconds']} s"


def show_logs(run: str | None, where: Where, *, pick: Pick, follow: bool) -> int:
    """Print what a run's ranks printed; 130 when Ctrl-C ended it.

    Raises:
        JobError: there is no such run, or nothing of the ranks that were picked.
    """
    path, handle = where.find(run)
    if handle is not None and (path is None or (names_job(handle, run) and pick == Pick())):
        if pick != Pick():
            what = f"{handle.name}/{handle.key} has no run that is seen from here, of whose ranks to choose"
            raise JobError(Problem(what, hint="without --rank, --node and --generation: what the job printed"))
        lines = output_of(handle, follow=follow)
    else:
        assert path is not None
        logs = Logs(path, pick)
        if follow and logs.over():
            logs.check()
        elif follow:
            for problem in logs.missing():
                sys.stderr.write(f"dltrain: so far, {problem.what}: waiting, as long as the run goes on\n")
        lines = logs.follow() if follow else logs.read()
    out = sys.stdout.buffer
    try:
        for line in lines:
            out.write(line)
            out.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more when it flushes at its end
        lead_nowhere(sys.stdout.fileno())
    return 0


def ask_to_stop(run: str | None, where: Where, *, now: bool) -> int:
    """Have a run end, and say how it did; 0 when it is not running any more, also when it was not before.

    Raises:
        JobError: there is no such run, or its driver is on another machine.
        RunFailed: it did not end in time.
    """
    path, handle = where.find(run)
    if handle is not None and state_of(handle).standing not in OVER:
        job = stop_job(handle, now=now, say=_say)
        path = path or where.run_of(handle)
        _say(f"{handle.name}/{handle.key}: {job}")
    if path is not None:
        status = stop_run(path, now=now, say=_say)
        _say(f"{status.name}: {status.state} after step {status.step}")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
