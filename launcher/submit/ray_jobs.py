"""Ray's Jobs API: the driver runs inside a cluster that is there already, and goes on without the submitter."""

from __future__ import annotations

import asyncio
import importlib
import logging
import secrets
import shlex
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ...core.document import Document
from ...core.errors import JobError, Problem, RunFailed
from ...core.spec import Spec
from .adapter import Adapter, JobState, Standing, checked, place
from .code import Code, code_of, dltrain_code
from .handle import Handle
from .ray_output import Silence, followed
from .steps import Steps, Submission

_STANDING: dict[str, Standing] = {
    "PENDING": "queued",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "STOPPED": "stopped",
    "FAILED": "failed",
}
_STOPPED = (130, 143)
_NAME, _RUNS, _GRACE = "dltrain", "dltrain/runs", "dltrain/stop_grace"  # keys of a job's metadata, all text
_END = 120  # seconds that a launch may take to end beside its ranks' own
_SILENCE = 300.0  # seconds after which a connection without a word is taken for dead


class RayFile(Spec):
    """A Ray cluster, as ``cluster_configs/ray.yaml`` explains."""

    kind: Literal["ray"]
    """What kind of cluster this is."""
    address: str
    """URL of the cluster's dashboard."""
    runs: str = ""
    """Parent of the run directories on the cluster's machines; empty is that of the submitting one."""
    environment: list[str] = Field(default_factory=list)
    """Names of variables that the job gets."""
    limit_mb: float = Field(default=100.0, gt=0)
    """How many megabytes of code may be sent."""


class RayJobs(Adapter):
    """A Ray cluster with a dashboard."""

    kind = "ray"

    def __init__(self, file: RayFile, path: Path) -> None:
        self._file, self._path = file, path

    @classmethod
    def read(cls, path: Path, document: Document) -> RayJobs:
        """The cluster of a file.

        Raises:
            JobError: with everything that is wrong in it.
        """
        file = checked(RayFile, document, path)
        problems: list[Problem] = []
        problems += _no_url(file.address, place(document, path, ("address",)))
        if file.runs and not Path(file.runs).is_absolute():
            what = f"'{file.runs}' is no absolute path"
            problems.append(Problem(what, place(document, path, ("runs",)), "the machines have no common folder"))
        if problems:
            raise JobError(*problems)
        return cls(file, path)

    @classmethod
    def at(cls, address: str) -> RayJobs:
        """The cluster whose dashboard is at ``address``, without a file.

        Raises:
            JobError: it is no URL.
        """
        if problems := _no_url(address, "--address"):
            raise JobError(*problems)
        return cls(RayFile(kind="ray", address=address), Path())

    def check(self) -> list[str]:
        """What the file says; the cluster is not asked."""
        return [f"the Ray cluster whose dashboard is at {self._file.address}"]

    def _entrypoint(self, submission: Submission, number: str) -> str:
        runs = shlex.quote(f"--run-dir={self._file.runs or submission.runs}")
        return launch_command(submission, runs, "--address=auto", f"--submission={self.kind}-{number}")

    def _variables(self, submission: Submission) -> tuple[str, ...]:
        missing = [name for name in self._file.environment if name not in submission.environ]
        if missing:
            hint = "set them, or take them out of the file"
            raise JobError(Problem(f"{', '.join(missing)}: not set here", f"{self._path}: environment", hint))
        return tuple(sorted({*submission.job_variables(), *self._file.environment}))

    def _code(self, submission: Submission) -> Code:
        return code_of(submission.folder, without=submission.runs, limit_mb=self._file.limit_mb)

    def render(self, submission: Submission) -> Steps:
        """The job as it is sent.

        Raises:
            JobError: the code is too much, or a variable is not there.
        """
        code, own = self._code(submission), dltrain_code()
        return Steps(
            commands=(f"POST {self._file.address}/api/jobs/ entrypoint: {self._entrypoint(submission, 'ID')}",),
            files={},
            notes=(f"{submission.folder} is sent: {code}", f"dltrain is sent: {own}"),
            environment=(*self._variables(submission), "RAY_JOB_STOP_WAIT_TIME_S"),
        )

    def hand_over(self, submission: Submission, say: Callable[[str], None]) -> Handle:
        """Send code and job.

        Raises:
            JobError: the code is too much, or a variable is not there.
            RunFailed: the cluster does not answer, or does not take the job.
        """
        code, names = self._code(submission), self._variables(submission)
        number = new_number()
        where = {"address": self._file.address}
        handle = submission.handle(self.kind, number, where, runs=self._file.runs)
        send(self._file.address, submission, code, names, self._entrypoint(submission, number), handle, say)
        return handle

    def jobs(self) -> list[tuple[Handle, JobState]]:
        """The jobs of dltrain that Ray knows; raises RunFailed where the cluster does not answer."""
        return jobs_at(self._file.address)

    @staticmethod
    def state(handle: Handle) -> JobState:
        """How the job stands; raises RunFailed where the cluster does not answer."""
        return state_at(handle.cluster["address"], handle.id)

    @staticmethod
    def output(handle: Handle, *, follow: bool) -> Iterator[bytes]:
        """What the driver has printed; raises RunFailed where the cluster does not answer."""
        address = handle.cluster["address"]
        if follow:
            yield from followed(partial(tail_at, address, handle.id), partial(RayJobs.state, handle))
        else:
            yield output_at(address, handle.id)

    @staticmethod
    def stop(handle: Handle, *, now: bool) -> None:
        """Have Ray signal the driver; raises RunFailed where the cluster does not answer, or ``now`` is asked."""
        stop_at(handle.cluster["address"], handle.id, now=now)


def _no_url(address: str, where: str) -> list[Problem]:
    """What is wrong with a dashboard's address; a secret in it is not shown."""
    if "@" in address or "?" in address or "#" in address:
        what = "a user, a password or a token has no place in the address, which is kept in files and shown"
        return [Problem(what, where, "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN in the environment give Ray's token")]
    if address.startswith(("http://", "https://")):
        return []
    hint = "the dashboard's, such as http://head:8265; dltrain launch --address takes host:6379"
    return [Problem(f"'{address}' is no URL", where, hint)]


def new_number() -> str:
    """A name for a job that Ray has not seen."""
    return f"dltrain-{secrets.token_hex(3)}"


def launch_command(submission: Submission, *more: str) -> str:
    """The shell command of a driver, with ``more`` options of the launch, which a shell may still expand."""
    begin = shlex.join(["python", "-P", "-m", "dltrain.cli", "launch", *submission.options])
    return " ".join([begin, *more, shlex.join(submission.words)]).rstrip()


def send(
    address: str,
    submission: Submission,
    code: Code,
    names: Sequence[str],
    entrypoint: str,
    handle: Handle,
    say: Callable[[str], None],
) -> None:
    """Send code, and the job of ``handle``, to the dashboard at ``address``, from where others find it again.

    Raises:
        RunFailed: it does not answer, or does not take the job.
    """
    client = _client(address)
    with tempfile.TemporaryDirectory(prefix="dltrain-") as folder:
        say(f"sending {submission.folder}: {code}")
        code.copy_to(Path(folder) / "code")
        dltrain_code().copy_to(Path(folder) / "dltrain")  # Ray calls a module as its folder is called
        environment = {name: submission.environ[name] for name in names}
        environment["RAY_JOB_STOP_WAIT_TIME_S"] = f"{submission.stop_grace + _END:.0f}"  # Ray's own is 3
        runtime = {
            "working_dir": f"{folder}/code",
            "py_modules": [f"{folder}/dltrain"],
            "env_vars": environment,
        }
        metadata = {_NAME: handle.name, _RUNS: handle.runs, _GRACE: str(handle.stop_grace)}
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=handle.id, metadata=metadata, runtime_env=runtime)
        except (RuntimeError, OSError) as error:
            raise RunFailed(f"the Ray cluster at {address} has not taken the job: {error}") from None


def state_at(address: str, number: str) -> JobState:
    """How a job stands.

    Raises:
        RunFailed: the cluster does not answer.
    """
    client = _client(address)
    with _asked(address, number):
        try:
            info = client.get_job_info(number)
        except RuntimeError as error:
            if "does not exist" in str(error):
                return JobState("unknown", "the cluster does not know it")
            raise
    return _state(info)


def jobs_at(address: str) -> list[tuple[Handle, JobState]]:
    """The jobs that dltrain has submitted to a cluster, and how they stand.

    Raises:
        RunFailed: the cluster does not answer.
    """
    client = _client(address)
    with _asked(address, "its jobs"):
        listed = client.list_jobs()
    return [(_found(info, address), _state(info)) for info in listed if info.submission_id and _NAME in _said(info)]


def _found(info: Any, address: str) -> Handle:
    said = _said(info)
    return Handle(
        kind=RayJobs.kind,
        id=str(info.submission_id),
        name=said[_NAME],
        cluster={"address": address},
        submitted=(info.start_time or 0) / 1000,
        runs=said.get(_RUNS, ""),
        stop_grace=float(said.get(_GRACE, 0)),
    )


def _said(info: Any) -> dict[str, str]:
    return info.metadata or {}


def _state(info: Any) -> JobState:
    status = str(info.status.value)
    if info.driver_exit_code in _STOPPED:
        return JobState("stopped", f"{status}, exit code {info.driver_exit_code}")
    more = "" if info.driver_exit_code is None else f"exit code {info.driver_exit_code}"
    return JobState(_STANDING[status], ", ".join(filter(None, [status, more])))


def output_at(address: str, number: str) -> bytes:
    """What a job's driver has printed.

    Raises:
        RunFailed: the cluster does not answer, or does not know the job.
    """
    client = _client(address)
    with _asked(address, number):
        text = str(client.get_job_logs(number))
    return text.encode()


def tail_at(address: str, number: str) -> Iterator[str]:
    """What a job's driver has printed and prints, over one connection.

    Raises:
        Silence: nothing has come for five minutes.
        RunFailed: the cluster does not answer, or does not know the job; or the connection breaks.
    """
    pieces = _client(address).tail_job_logs(number)
    with _asked(address, number), asyncio.Runner() as runner:

        async def piece() -> str | None:
            """None after too long a silence."""
            deadline = asyncio.timeout(_SILENCE)
            try:
                async with deadline:
                    return str(await anext(pieces, ""))
            except TimeoutError:
                if deadline.expired():
                    return None
                raise

        while text := runner.run(piece()):
            yield text
    if text is None:
        raise Silence(f"the Ray cluster at {address} has said nothing of {number} for {_SILENCE:g} s")


def stop_at(address: str, number: str, *, now: bool) -> None:
    """Have Ray signal a job's driver.

    Raises:
        RunFailed: the cluster does not answer, or ``now`` is asked of it.
    """
    if now:
        raise RunFailed("Ray's Jobs API has one way to stop a job: leave --now out")
    client = _client(address)
    with _asked(address, number):
        client.stop_job(number)


@contextmanager
def _asked(address: str, number: str) -> Generator[None]:
    """Requests about a job: what the client raises becomes RunFailed."""
    try:
        yield
    except Exception as error:  # Ray's, requests' and aiohttp's have no class in common
        raise RunFailed(f"the Ray cluster at {address} does not answer for {number}: {_why(error)}") from None


def _why(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _client(address: str) -> Any:
    """A client of the Jobs API, which takes the token from Ray's own variables or file.

    Raises:
        RunFailed: nobody answers there.
    """
    jobs: Any = importlib.import_module("ray.job_submission")
    for name in ("ray", jobs.JobSubmissionClient.__module__):  # they tell of every upload and connection
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return jobs.JobSubmissionClient(address)
    except Exception as error:  # it asks for the cluster's version, so any that a request raises
        raise RunFailed(f"the Ray cluster at {address} does not answer: {_why(error)}") from None
