"""Machines that Ray's cluster launcher starts (``ray up``), and then the Jobs API of their head, through its tunnel."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...core.document import Document
from ...core.errors import JobError, Problem, RunFailed
from .adapter import Adapter, JobState, place
from .code import code_of, dltrain_code
from .handle import Handle
from .ray_jobs import jobs_at, launch_command, new_number, output_at, send, state_at, stop_at, tail_at
from .ray_output import followed
from .schemas import faults, ray_launcher
from .steps import Steps, Submission

_LIMIT_MB = 100.0
_TUNNEL = 90.0  # seconds for a connection to the head
_MACHINES = 1800  # seconds for machines to be started and set up
_RUNS = '"$HOME/dltrain-runs"'  # on the head, which runs the driver


class Machines(Adapter):
    """A file of Ray's cluster launcher: machines of AWS, Google Cloud, Azure, or of one's own."""

    kind = "vms"

    def __init__(self, path: Path, value: dict[str, Any]) -> None:
        self._path, self._value = path.absolute(), value

    @classmethod
    def read(cls, path: Path, document: Document) -> Machines:
        """The cluster of a file.

        Raises:
            JobError: with everything that Ray's own schema finds wrong in it.
        """
        problems = faults(document, ray_launcher(), path)
        value: dict[str, Any] = document.value
        types, head = value.get("available_node_types"), value.get("head_node_type")
        if not problems and isinstance(types, dict) and head not in types:
            where = place(document, path, ("head_node_type",))
            problems.append(Problem(f"'{head}' is none of available_node_types", where, f"one of {', '.join(types)}"))  # pyright: ignore[reportUnknownArgumentType]  # keys of a YAML file are text
        if problems:
            raise JobError(*problems)
        return cls(path, value)

    def check(self) -> list[str]:
        """What the file says, checked against Ray's schema; no cloud is asked."""
        return [f"machines of {self._value['provider']['type']} for Ray's cluster launcher, as its schema has it"]

    def _entrypoint(self, submission: Submission, number: str) -> str:
        gather = f'python -P -m dltrain.launcher.submit.gather "$RAY_ADDRESS" {submission.machines} $$ {_MACHINES}'
        more = (f"--run-dir={_RUNS}", "--address=auto", f"--submission={self.kind}-{number}")
        return f"{gather} && exec {launch_command(submission, *more)}"

    def _refuse_too_many(self, submission: Submission) -> None:
        most = self._value.get("max_workers")
        if isinstance(most, int) and submission.machines > most + 1:
            what = f"the job wants {submission.machines} nodes, the file allows {most} workers"
            raise JobError(Problem(what, "--nodes", f"raise max_workers in {self._path.name}"))

    def render(self, submission: Submission) -> Steps:
        """The commands of Ray's launcher, and the job as it is sent through its tunnel.

        Raises:
            JobError: the code is too much, or the file allows fewer machines.
        """
        self._refuse_too_many(submission)
        code = code_of(submission.folder, without=submission.runs, limit_mb=_LIMIT_MB)
        job = f"POST http://127.0.0.1:PORT/api/jobs/ entrypoint: {self._entrypoint(submission, 'ID')}"
        return Steps(
            commands=(shlex.join(_up(self._path)), shlex.join(_dashboard(self._path, "PORT")), job),
            files={},
            notes=(f"{submission.folder} is sent: {code}", f"dltrain is sent: {dltrain_code()}"),
            environment=(*submission.job_variables(), "RAY_JOB_STOP_WAIT_TIME_S"),
        )

    def hand_over(self, submission: Submission, say: Callable[[str], None]) -> Handle:
        """Start what is not running yet, and send code and job.

        Raises:
            JobError: the code is too much, or the file allows fewer machines.
            RunFailed: the machines do not start, or do not take the job.
        """
        self._refuse_too_many(submission)
        code = code_of(submission.folder, without=submission.runs, limit_mb=_LIMIT_MB)
        say(f"starting machines: {shlex.join(_up(self._path))}")
        _require_ray()
        if subprocess.run(_up(self._path), stdin=subprocess.DEVNULL, check=False).returncode:
            raise RunFailed("ray up has failed: what it said stands above")
        number = new_number()
        entrypoint = self._entrypoint(submission, number)
        handle = submission.handle(self.kind, number, {"file": str(self._path)})
        with _tunnel(self._path) as address:
            send(address, submission, code, submission.job_variables(), entrypoint, handle, say)
        say(f"the machines stay until: ray down {self._path}")
        return handle

    def jobs(self) -> list[tuple[Handle, JobState]]:
        """The jobs of dltrain that the head knows; raises RunFailed where it cannot be reached."""
        with _tunnel(self._path) as address:
            where = {"file": str(self._path)}
            return [(replace(handle, kind=self.kind, cluster=where), state) for handle, state in jobs_at(address)]

    @staticmethod
    def state(handle: Handle) -> JobState:
        """How the job stands; raises RunFailed where its head cannot be reached."""
        with _tunnel(Path(handle.cluster["file"])) as address:
            return state_at(address, handle.id)

    @staticmethod
    def output(handle: Handle, *, follow: bool) -> Iterator[bytes]:
        """What the driver has printed; raises RunFailed where its head cannot be reached."""
        file = Path(handle.cluster["file"])
        if follow:
            yield from followed(partial(_tail, file, handle.id), partial(Machines.state, handle))
        else:
            with _tunnel(file) as address:
                yield output_at(address, handle.id)

    @staticmethod
    def stop(handle: Handle, *, now: bool) -> None:
        """Have Ray signal the driver; raises RunFailed where its head cannot be reached."""
        with _tunnel(Path(handle.cluster["file"])) as address:
            stop_at(address, handle.id, now=now)


def _up(file: Path) -> list[str]:
    return ["ray", "up", "--yes", str(file)]


def _dashboard(file: Path, port: str) -> list[str]:
    return ["ray", "dashboard", "--port", port, str(file)]


def _require_ray() -> None:
    if shutil.which("ray") is None:
        raise RunFailed("there is no 'ray' on the path: activate the environment that has it")


@contextlib.contextmanager
def _tunnel(file: Path) -> Generator[str]:
    """A connection to the dashboard of the head, as the URL of its near end.

    Raises:
        RunFailed: there is none in time.
    """
    _require_ray()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    process = subprocess.Popen(
        _dashboard(file, str(port)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + _TUNNEL
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunFailed(f"the head of {file.name} cannot be reached: {shlex.join(_dashboard(file, '8265'))}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ray starts an ssh, which would outlive it
        process.wait()


def _tail(file: Path, number: str) -> Iterator[str]:
    """What a job's driver has printed and prints, over one connection in a tunnel of its own, which may break too."""
    with _tunnel(file) as address:
        yield from tail_at(address, number)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
