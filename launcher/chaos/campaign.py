"""Runs of one job, the first undisturbed, the others with faults; each is compared with the first to the bit."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.checks import check_job
from ...core.errors import DltrainError, JobError, Problem, RunFailed
from ...core.job import Job
from ..interrupt import StopRequests
from ..rundir import newest_run
from .faults import KINDS, Fault, check_faults
from .lan import Lan
from .player import Performance, Player
from .schedules import random_schedule
from .stand import OneMachine, Stand
from .verdict import Trace, differences
from .watch import Watch

_LEAST, _PER_FAULT, _TIMES_CLEAN = 120.0, 60.0, 5.0  # seconds, seconds, times: when a run is said to hang
_TAIL = 12  # lines of a failed launch that are told


@dataclass(frozen=True)
class Clean:
    """The run that nothing happened to."""

    world: int
    steps: int
    seconds: float
    trace: Trace


@dataclass(frozen=True)
class Trial:
    """A run with faults, and what is to be said of it.

    Attributes:
        number: of its schedule.
        wrong: in what it differs from the clean run; nothing when it is identical and every fault has happened.
        folder: what is left of it, where something was wrong.
    """

    number: int
    faults: tuple[Fault, ...]
    performance: Performance
    wrong: tuple[str, ...]
    folder: str = ""

    @property
    def identical(self) -> bool:
        return not self.wrong

    def to_json(self) -> dict[str, Any]:
        """What ``dltrain chaos --json`` prints of it."""
        played = [
            {"fault": str(one.fault), "steps_done": max(0, one.mark), "seconds_to_new_step": one.back}
            for one in self.performance.played
        ]
        return {
            "schedule": self.number,
            "faults": ", ".join(map(str, self.faults)),
            "identical": self.identical,
            "wrong": list(self.wrong),
            "played": played,
            "starts": self.performance.starts,
            "steps_again": self.performance.steps_again,
            "seconds": self.performance.seconds,
            "folder": self.folder,
        }


@dataclass(frozen=True)
class Plan:
    """Which schedules are played: ``faults`` as number 1; or those numbered in ``numbers``, drawn from ``seed``."""

    faults: tuple[Fault, ...] = ()
    seed: int = 0
    numbers: tuple[int, ...] = ()

    def schedules(self, *, world: int, nodes: int, steps: int) -> dict[int, tuple[Fault, ...]]:
        """The faults by number, for a run of so many ranks and steps."""
        if self.faults:
            return {1: self.faults}
        return {
            number: random_schedule(self.seed, number, world=world, nodes=nodes, steps=steps) for number in self.numbers
        }


@dataclass
class Campaign:
    """One job and the cluster that it is tried on. Use :func:`campaign`."""

    job: Job
    stand: Stand
    folder: Path
    stop: StopRequests
    _kept: bool = field(default=False)

    def clean(self) -> Clean:
        """The run that nothing happens to.

        Raises:
            JobError: the job is wrong.
            RunFailed: it fails by itself, or hangs.
        """
        # How long it takes is not known yet: what is known is how long it may stand still.
        recovery = self.job.recovery
        still = 2 * recovery.start_timeout + recovery.stall_at_start
        folder, done = self._launch("clean", (), still=still)
        if done.late:
            self._kept = True
            after = f"{max(0, done.steps)} of {done.total_steps} steps" if done.total_steps else "its start"
            what = f"the job hangs without any fault: after {after} it did no other for {still:.0f} s"
            what += f" (recovery.stall_at_start and twice start_timeout); what it left is in {folder}"
            raise RunFailed("\n".join(filter(None, [what, _tail(folder / "launch.log")])))
        if done.code:
            error = JobError if done.code == 2 else RunFailed
            self._kept = error is RunFailed  # its words name a report
            raise error(f"the job fails without any fault: {_tail(folder / 'launch.log')}")
        trace = Trace.read(self._run(folder))
        shutil.rmtree(folder)
        return Clean(self.stand.demand.world, done.total_steps, done.seconds, trace)

    def trial(self, number: int, faults: tuple[Fault, ...], clean: Clean) -> Trial:
        """A run with ``faults``; what it leaves is removed if it is identical to the clean one."""
        limit = _LEAST + _TIMES_CLEAN * clean.seconds + sum(map(self._patience, faults))
        folder, done = self._launch(f"schedule-{number}", faults, limit=limit)
        wrong = tuple(self._wrong(folder, faults, done, clean, limit))
        if wrong:
            self._kept = True
            return Trial(number, faults, done, wrong, str(folder))
        shutil.rmtree(folder)
        return Trial(number, faults, done, wrong)

    def _patience(self, fault: Fault) -> float:
        """How many seconds longer a run may take for a fault."""
        recovery = self.job.recovery
        if fault.kind == "stop":
            return _PER_FAULT + 2 * (recovery.stall if isinstance(recovery.stall, float) else _LEAST)
        return _PER_FAULT + (recovery.node_wait + fault.lasts if fault.lasts is not None else 0)

    def _wrong(
        self, folder: Path, faults: Sequence[Fault], done: Performance, clean: Clean, limit: float
    ) -> Iterator[str]:
        if done.late:
            yield f"it had not ended after {limit:.0f} s"
            return
        if done.code:
            yield f"the run failed (exit code {done.code}): {_tail(folder / 'launch.log')}"
            return
        played = [one.fault for one in done.played]
        for fault in faults:
            if fault not in played:
                yield f"{fault} never happened: the run was over before"
        try:
            yield from differences(Trace.read(self._run(folder)), clean.trace)
        except (OSError, IndexError, DltrainError) as error:
            yield f"what it left cannot be read: {error}"

    def _run(self, folder: Path) -> Path:
        path = newest_run(folder / "runs", self.job.name)
        assert path is not None, "the launch has ended well"
        return path

    def _launch(
        self, name: str, faults: Sequence[Fault], *, limit: float = math.inf, still: float = math.inf
    ) -> tuple[Path, Performance]:
        """Run the job in a folder of its own while ``faults`` happen to it; the folder, and what came of it.

        It is killed after ``limit`` seconds in all, or ``still`` seconds without another step.
        """
        self.stand.ready()
        folder = self.folder / name
        folder.mkdir()
        file = folder / "job.json"  # JSON is YAML
        file.write_text(json.dumps(self.job.model_dump(mode="json")), encoding="utf-8")
        asked = self.job.recovery.max_restarts
        restarts = max(0 if asked == "auto" else asked, 2 * len(faults))  # a fault may take two generations with it
        settings = {
            "resources.placement": self.stand.placement,
            "resources.nproc_per_node": self.stand.demand.ranks,  # the cluster has more cores than one run is to take
            "recovery.max_restarts": restarts,
            "checkpoint.to": "null",
            "tracking.wandb.mode": "disabled",
            "tracking.tensorboard": "false",
        }
        command = [
            *self.stand.prefix,
            *(sys.executable, "-P", "-m", "dltrain.cli", "launch", str(file)),
            *(f"{key}={value}" for key, value in settings.items()),
            *("--run-dir", str(folder / "runs"), "--address", self.stand.address, "--quiet", *self.stand.options),
        ]
        (folder / "command").write_text(shlex.join(command) + "\n", encoding="utf-8")
        watch = Watch(folder / "runs", self.job.name)
        interrupted = self.stop.leave_if_asked
        links = self.stand if isinstance(self.stand, Lan) else None
        player = Player(
            command,
            folder / "launch.log",
            watch,
            faults,
            links=links,
            limit=limit,
            still=still,
            interrupted=interrupted,
        )
        return folder, player.play()

    def close(self) -> None:
        """Remove the folder, unless something of it is worth a look."""
        if not self._kept:
            shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def campaign(job: Job, faults: tuple[Fault, ...] = ()) -> Generator[Campaign]:
    """A cluster on this machine to try ``job`` on, where ``faults`` can happen.

    Raises:
        JobError: the job is wrong, or a fault cannot happen to it.
        ClusterError: Ray did not start.
    """
    with StopRequests() as stop:
        cuts = sum(KINDS[fault.kind].links for fault in faults)
        stand = Lan(job, cuts, stop.leave_if_asked) if cuts else OneMachine(job, stop.leave_if_asked)
        _refuse(faults, world=stand.demand.world, nodes=job.resources.nodes)
        problems = check_job(job, world=stand.demand.world)
        if job.parallel.is_open:
            what = "runs that are compared to the bit need the same strategy, and each would choose for itself"
            problems.append(Problem(what, "parallel.strategy", "name one"))
        if problems:
            raise JobError(*problems)
        with stand:
            trials = Campaign(job, stand, Path(tempfile.mkdtemp(prefix="dltrain-chaos-")), stop)
            try:
                yield trials
            finally:
                trials.close()


def run_campaign(
    job: Job, plan: Plan, *, on_clean: Callable[[Clean], None], on_trial: Callable[[Trial], None]
) -> tuple[Clean, list[Trial]]:
    """Run the job once undisturbed and once for each schedule of ``plan``; each is told of as it ends.

    Raises:
        JobError: the job is wrong, or a fault cannot happen to it.
        RunFailed: the job fails by itself.
        Interrupted: by a signal.
    """
    with campaign(job, plan.faults) as trials:
        nodes = job.resources.nodes
        clean = trials.clean()
        _refuse(plan.faults, world=clean.world, nodes=nodes, steps=clean.steps)
        on_clean(clean)
        done: list[Trial] = []
        for number, faults in plan.schedules(world=clean.world, nodes=nodes, steps=clean.steps).items():
            done.append(trials.trial(number, faults, clean))
            on_trial(done[-1])
        return clean, done


def _refuse(faults: tuple[Fault, ...], *, world: int, nodes: int, steps: int | None = None) -> None:
    problems = check_faults(faults, world=world, nodes=nodes, steps=steps)
    if problems:
        raise JobError(*problems)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_TAIL:])
