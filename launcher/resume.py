"""Which run a launch continues, and from which checkpoints: decided before anything is started."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.lease import RENEW, of_generation, release, renew, take
from ..checkpoint.manifest import CorruptCheckpoint, Manifest
from ..checkpoint.reader import catalogue, open_manifest
from ..core.errors import JobError, Problem
from ..core.formats import is_url
from ..core.job import Job
from ..core.storage import Storage
from .rundir import Record, RunDir, differences, newest_run


@dataclass
class Start:
    """What a launch goes on from. :meth:`close` it to release the run.

    Attributes:
        run: the run directory: one that is continued is held from the beginning, a new one from :meth:`open` on.
        origin: a folder with another run's checkpoints, to start from where the run has none of its own; or empty.
        init: a folder of checkpoints, to take only the weights from where the run has none of its own; or empty.
    """

    run: RunDir | None = None
    origin: str = ""
    init: str = ""
    _before: tuple[Record, str] | None = None

    @property
    def chosen(self) -> Mapping[str, Any]:
        """What the run that is continued has chosen for itself, by dotted key."""
        return self.run.record.chosen if self.run is not None else {}

    def open(self, job: Job, runs: Path, yaml: str, chosen: Mapping[str, Any] | None = None) -> RunDir:
        """The run directory, made now if it is a new one, with ``job`` (also as text) as what it computes.

        ``chosen`` is what of it was chosen, by dotted key.
        """
        data = job.model_dump(mode="json")
        if self.run is None:
            self.run = RunDir.create(runs, job.name, data, origin=self.origin, init=self.init)
        else:
            self._before = self.run.record, self.run.read("job.yaml")
        if self._before is not None or chosen:
            self.run.update(job=data, chosen=dict(chosen or {}))
        self.run.write("job.yaml", yaml)
        return self.run

    def take_back(self) -> None:
        """Undo :meth:`open`, for a launch that was refused after it: leave the runs as they were found.

        A run that has trained since is left as it is.
        """
        if self.run is None:
            return
        now, before = self.run.record, self._before[0] if self._before else Record("", "")
        if now.step > before.step or now.generations > before.generations + 1:
            return
        if self._before is None:
            self.run.discard()
            self.run = None
        else:
            record, yaml = self._before
            self.run.restore(record)
            self.run.write("job.yaml", yaml)

    def close(self) -> None:
        if self.run is not None:
            self.run.close()


def checkpoint_url(job: Job, run: RunDir) -> str:
    """Where a run's checkpoints are written, and looked for first."""
    return job.checkpoint.to or str(run.path / "checkpoints")


def open_storage(job: Job, url: str, where: str = "checkpoint.to") -> Storage:
    """A folder of checkpoints; the job's storage options are for remote ones."""
    return Storage(url, job.checkpoint.options if is_url(url) else None, where=where)


class HeldLease:
    """The lease of a folder of checkpoints while a run is at work: renewed also while there are no ranks."""

    def __init__(self, storage: Storage, token: str) -> None:
        self._storage, self.token = storage, token
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def fence(self, generation: int) -> None:
        """Hand the folder to this generation of ranks: what an older one still has in hand is not completed any more.

        Where the storage cannot be reached, the generation's own first renewal does it.
        """
        with self._lock:
            self._renew(of_generation(self.token, generation))

    def close(self) -> None:
        """Give it back."""
        self._over.set()
        self._thread.join(RENEW)  # a late renewal would bring the lease back
        with contextlib.suppress(OSError):  # then it ends by itself
            release(self._storage, self.token)

    def _run(self) -> None:
        while not self._over.wait(RENEW):
            with self._lock:
                self._renew(self.token)

    def _renew(self, token: str) -> None:
        with contextlib.suppress(OSError):
            renew(self._storage, token)


@contextlib.contextmanager
def leased(storage: Storage, run: RunDir, on_message: Callable[[str], None]) -> Generator[HeldLease]:
    """Keep other runs out of a folder of checkpoints, in which this one's ranks write under the token.

    Raises:
        JobError: another run is at work there.
    """
    token = take(storage, run.record.id, pid=os.getpid(), on_message=on_message, where="checkpoint.to")
    with contextlib.closing(HeldLease(storage, token)) as lease:
        yield lease


def decide_start(job: Job, *, runs: Path, resume: str, init_from: str = "", on_message: Callable[[str], None]) -> Start:
    """Settle what to continue; nothing is made yet.

    ``"auto"`` continues the newest unfinished run of this name if its job computes the same. Else it begins a new one,
    which still picks up checkpoints of the same job from an explicit ``checkpoint.to``. ``"never"`` begins a new run. A
    path or URL names a run directory to continue, or a checkpoint folder to start a new run from. ``init_from`` names
    one whose weights a new run begins with; an unfinished run that began so is continued by ``"auto"``.

    Raises:
        JobError: there is nothing at such a path, ``checkpoint.to`` holds another job's checkpoints, or one of the two
            cannot be used.
    """
    if resume not in ("auto", "never"):
        if init_from:
            raise JobError(Problem("cannot stand beside a path in --resume", "--init-from", "either is a beginning"))
        return _named(job, runs, resume, on_message)
    init = _weights_folder(job, init_from) if init_from else ""
    run = _unfinished(job, runs, on_message, init=init or None) if resume == "auto" else None
    return _checked(Start(run, init=init), job, resume)


def _weights_folder(job: Job, named: str) -> str:
    """The checkpoint folder that a path or URL of a run or of checkpoints means."""
    run = Path(named)
    if (run / "run.json").is_file():
        record = Record.read(run)
        if record is None:
            hint = "name its folder of checkpoints"
            raise JobError(Problem(f"the run.json of {named} cannot be read", "--init-from", hint))
        named = record.job.get("checkpoint", {}).get("to") or str(run / "checkpoints")
    storage = open_storage(job, named, "--init-from")
    with _readable(storage, "--init-from"):
        if not catalogue(storage):
            hint = "name a run directory, or a folder with step-* checkpoints"
            raise JobError(Problem(f"there is no complete checkpoint at {storage}", "--init-from", hint))
    return str(storage)


def _checked(start: Start, job: Job, resume: str) -> Start:
    try:
        _check_destination(job, resume, continued=start.run is not None)
    except JobError:
        start.close()
        raise
    return start


def _unfinished(
    job: Job, runs: Path, on_message: Callable[[str], None], origin: str | None = None, init: str | None = None
) -> RunDir | None:
    """Newest run of this name that is to be continued, and began from ``origin`` or ``init`` where that is given."""
    path = newest_run(runs, job.name)
    if path is None:
        return None
    run = RunDir.reopen(path)
    if run is None:
        on_message(f"{_shown(path)} is in use by another launch, or damaged: beginning a new run")
        return None
    record = run.record
    if record.state != "finished" and record.job and origin in (None, record.origin) and init in (None, record.init):
        # (a script's run has no job)
        changed = differences(job, record.job)
        if not changed:
            on_message(f"continuing {_shown(path)} ('--resume never' starts afresh)")
            return run
        on_message(f"{_shown(path)} is unfinished, but its job differs ({', '.join(changed[:3])}): beginning a new run")
    run.close()
    return None


def _named(job: Job, runs: Path, resume: str, on_message: Callable[[str], None]) -> Start:
    path = Path(resume)
    if (path / "run.json").is_file():
        run = RunDir.reopen(path.absolute())
        if run is None:
            raise JobError(Problem(f"{resume} is in use by another launch, or its run.json is damaged", "--resume"))
        changed = differences(job, run.record.job)
        if changed:
            on_message(f"continuing {_shown(run.path)} with another job than it began with: {', '.join(changed)}")
        return _checked(Start(run, run.record.origin), job, resume)
    storage = open_storage(job, resume, "--resume")
    with _readable(storage, "--resume"):
        found = catalogue(storage)
    if not found:
        hint = "name a run directory, or a folder with step-* checkpoints"
        raise JobError(Problem(f"there is no run and no complete checkpoint at {storage}", "--resume", hint))
    origin = str(storage)
    return _checked(Start(_unfinished(job, runs, on_message, origin), origin), job, resume)


def _check_destination(job: Job, resume: str, *, continued: bool) -> None:
    """Refuse an explicit ``checkpoint.to`` that cannot be used, or that a new run would mix up with another."""
    to, where = job.checkpoint.to, "checkpoint.to"
    if to is None:
        return
    storage = open_storage(job, to)
    storage.check_writable()
    if continued:
        return
    with _readable(storage, where):
        manifest = _newest_manifest(storage)
    if manifest is None:
        return
    if resume == "never":
        raise JobError(Problem(f"{storage} holds checkpoints already", where, "name another folder, or empty it"))
    changed = differences(job, manifest.job)
    if changed:
        what = f"{storage} holds checkpoints of another job (different: {', '.join(changed[:3])})"
        raise JobError(Problem(what, where, "name another folder, or start from it with --resume"))
    if manifest.step >= manifest.total_steps:
        what = f"{storage} holds the finished run already (step {manifest.step} of {manifest.total_steps})"
        raise JobError(Problem(what, where, "name another folder"))


def _newest_manifest(storage: Storage) -> Manifest | None:
    """The newest manifest that can be read; the ranks say what is wrong with a newer one."""
    for entry in catalogue(storage):
        with contextlib.suppress(CorruptCheckpoint):
            return open_manifest(storage, entry.step)
    return None


@contextlib.contextmanager
def _readable(storage: Storage, where: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise JobError(Problem(f"{storage} cannot be read: {error.strerror or error}", where)) from error


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
