"""Slurm: an sbatch script that starts Ray on its allocation and runs ``dltrain launch`` there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from ...core.document import Document
from ...core.errors import JobError, Problem, RunFailed
from ...core.job import Resources
from ...core.recovery import RecoverySpec
from ...core.spec import Duration, Spec
from .adapter import OVER, Adapter, JobState, Standing, checked, place
from .follow import lines_of
from .handle import Handle
from .slurm_script import script
from .steps import Steps, Submission, on_path

_SBATCH = ("sbatch", "--parsable")
_PATIENCE = 60.0  # seconds for an answer of Slurm's commands
_OURS = ("job-name", "nodes", "ntasks", "ntasks-per-node", "output", "error", "open-mode", "signal", "requeue", "chdir")
_STANDING: dict[str, Standing] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"), "queued"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"), "running"),
    "COMPLETED": "finished",
    "CANCELLED": "stopped",
}
_FIELD = re.compile(r"([A-Za-z][\w:/]*)=(.*?)(?=\s+[A-Za-z][\w:/]*=|\s*$)")  # of scontrol's lines
_GRACE: float = RecoverySpec.model_fields["stop_grace"].default  # Slurm is not told a job's own
_STOPPED = ("130:0", "143:0")  # exit codes of a launch that was asked to stop


class SlurmFile(Spec):
    """A Slurm cluster, as ``cluster_configs/slurm.yaml`` explains."""

    kind: Literal["slurm"]
    """What kind of cluster this is."""
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    """Options of sbatch, without dashes."""
    setup: str = ""
    """Shell lines for every node; empty puts the submitting environment on the path."""
    warning: Duration = 120.0
    """Time before the limit at which the job saves a checkpoint and ends."""
    requeue: bool = True
    """Whether it then goes back into the queue."""


class Slurm(Adapter):
    """A Slurm cluster whose nodes share the working directory with this machine."""

    kind = "slurm"

    def __init__(self, file: SlurmFile) -> None:
        self._file = file

    @classmethod
    def read(cls, path: Path, document: Document) -> Slurm:
        """The cluster of a file.

        Raises:
            JobError: with everything that is wrong in it.
        """
        file = checked(SlurmFile, document, path)
        where = {name: place(document, path, ("sbatch", name)) for name in file.sbatch}
        hint = "dltrain submit sets this itself"
        ours = [name for name in file.sbatch if name in _OURS]
        problems = [Problem("this is not the file's to say", where[name], hint) for name in ours]
        problems += [
            Problem("options stand here without dashes", where[name], f"write '{name.lstrip('-')}'")
            for name in file.sbatch
            if name.startswith("-")
        ]
        if problems:
            raise JobError(*problems)
        return cls(file)

    def check(self) -> list[str]:
        """What the file says; where there is an sbatch, also whether Slurm would take a job of one node.

        Raises:
            JobError: it would not.
        """
        options = " ".join(f"--{name}={value}" for name, value in self._file.sbatch.items())
        said = f"Slurm, sbatch {options}".rstrip()
        if shutil.which("sbatch") is None or _ask("scontrol", "ping").returncode:
            return [said, "no Slurm answers here: its options were not tried"]
        trial = Submission("check", (), ("true",), False, Resources(), 1, 0.0, Path("/"), Path("/"), {})
        done = _ask("sbatch", "--test-only", text=self._script(trial))
        if done.returncode:
            raise JobError(Problem(done.stderr.strip(), "sbatch --test-only"))
        return [said, *done.stderr.strip().splitlines()]

    def render(self, submission: Submission) -> Steps:
        """The script, and the command that takes it."""
        return Steps(
            commands=(" ".join(_SBATCH),),
            files={"(standard input of sbatch)": self._script(submission)},
            notes=(f"nothing is copied: the nodes share {submission.folder} and {submission.runs}",),
            environment=("all of this shell's, as sbatch passes it on",),
        )

    def hand_over(self, submission: Submission, say: Callable[[str], None]) -> Handle:
        """Submit the script.

        Raises:
            RunFailed: sbatch refuses it.
        """
        (submission.runs / submission.name).mkdir(parents=True, exist_ok=True)  # sbatch does not make it for the log
        done = _ask(*_SBATCH, text=self._script(submission))
        if done.returncode:
            raise RunFailed(f"sbatch has not taken the job: {done.stderr.strip()}")
        number, _, cluster = done.stdout.strip().partition(";")
        return submission.handle(self.kind, number, {"cluster": cluster} if cluster else {})

    def _script(self, submission: Submission) -> str:
        log = submission.runs / submission.name / "slurm-%j.log"
        resources, file = submission.resources, self._file
        options = {
            "job-name": submission.name,
            "nodes": submission.machines,
            "ntasks-per-node": 1,
            "output": str(log),
            "open-mode": "append",
            "signal": f"B:USR1@{file.warning:.0f}",
            "requeue" if file.requeue else "no-requeue": True,
        }
        if isinstance(resources.nproc_per_node, int):
            options["cpus-per-task"] = resources.nproc_per_node * (resources.cpus_per_rank or 1)
        return script(
            name=submission.name,
            options=options | file.sbatch,
            folder=str(submission.folder),
            log=str(log.with_name("slurm-")),
            setup=file.setup or on_path(),
            launch=("dltrain", "launch", *submission.options, f"--run-dir={submission.runs}"),
            target=submission.words,
            again=("--resume=auto",) if submission.is_job else (),
            nodes=submission.machines,
            requeue=file.requeue,
        )

    def jobs(self) -> list[tuple[Handle, JobState]]:
        """This user's jobs that Slurm still knows, those of dltrain told by where they log; raises RunFailed."""
        done = _ask("scontrol", "show", "job", "--oneliner")
        if done.returncode:
            raise RunFailed(f"Slurm does not list its jobs: {done.stderr.strip()}")
        found: list[tuple[Handle, JobState]] = []
        for line in done.stdout.splitlines():
            fields = dict(_FIELD.findall(line))
            number, name, log = fields.get("JobId", ""), fields.get("JobName", ""), Path(fields.get("StdOut", ""))
            mine = fields.get("UserId", "").endswith(f"({os.getuid()})")
            if not mine or (log.parent.name, log.name) != (name, f"{self.kind}-{number}.log"):
                continue
            since = datetime.fromisoformat(fields["SubmitTime"]).timestamp()
            handle = Handle(self.kind, number, name, {}, since, str(log.parent.parent), _GRACE)
            state = _state(fields.get("JobState", ""), fields.get("ExitCode", ""), fields.get("Reason", ""))
            found.append((handle, state))
        return found

    @staticmethod
    def state(handle: Handle) -> JobState:
        """How the job stands; Slurm forgets jobs some minutes after their end, unless it keeps accounts.

        Raises:
            RunFailed: Slurm does not answer.
        """
        where = _where(handle)
        done = _ask("scontrol", *where, "show", "job", "--oneliner", handle.id)
        if not done.returncode:
            pairs = (word.partition("=") for word in done.stdout.split())
            fields = {name: value for name, _, value in pairs}
            return _state(fields.get("JobState", ""), fields.get("ExitCode", ""), fields.get("Reason", ""))
        if "Invalid job id" not in done.stderr:
            raise RunFailed(f"Slurm does not say how job {handle.id} stands: {done.stderr.strip()}")
        columns = ("--noheader", "--allocations", "--parsable2", "--format=State,ExitCode")
        done = _ask("sacct", *where, *columns, "-j", handle.id)
        state, _, code = done.stdout.strip().partition("|")
        return _state(state.partition(" ")[0], code, "") if state else JobState("unknown", "Slurm has forgotten it")

    @staticmethod
    def output(handle: Handle, *, follow: bool) -> Iterator[bytes]:
        """What the script has printed, over requeues."""
        log = Path(handle.runs) / handle.name / f"slurm-{handle.id}.log"
        return lines_of(log, until=(lambda: Slurm.state(handle).standing in OVER) if follow else None)

    @staticmethod
    def stop(handle: Handle, *, now: bool) -> None:
        """Signal the script, which has the ranks save; a job that waits, or is to end ``now``, is cancelled.

        Raises:
            RunFailed: Slurm refuses.
        """
        running = Slurm.state(handle).standing == "running"
        how = ("--batch", "--signal=TERM") if running and not now else ()
        done = _ask("scancel", *_where(handle), *how, handle.id)
        if done.returncode:
            raise RunFailed(f"scancel: {done.stderr.strip()}")


def _where(handle: Handle) -> tuple[str, ...]:
    """The option that names the job's cluster, where sbatch has chosen one of several."""
    cluster = str(handle.cluster.get("cluster", ""))
    return (f"--clusters={cluster}",) if cluster else ()


def _state(state: str, code: str, reason: str) -> JobState:
    standing = _STANDING.get(state, "failed")
    if standing == "failed" and code in _STOPPED:
        return JobState("stopped", f"{state}, exit code {code.partition(':')[0]}")
    why = {"queued": reason, "failed": f"exit code {code}"}.get(standing, "")
    return JobState(standing, ", ".join(filter(None, [state, why])))


def _ask(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        RunFailed: it is not there, or it does not answer.
    """
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except FileNotFoundError:
        raise RunFailed(f"there is no {command[0]} here: run this where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{command[0]} has not answered within {_PATIENCE:g} s") from None
