"""The run directory: ``<runs>/<name>/<number>/``, its lock, its record, and which one a launch continues."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

from ..core.errors import JobError, Problem, RunFailed
from ..core.job import Job
from ..core.processes import Driver

State = Literal["running", "finished", "stopped", "failed"]

#: Parts of a job that may differ when a run is continued: they do not change what is computed.
_FREE = (
    *("tracking", "resources", "recovery", "checkpoint.every", "checkpoint.options"),
    *("checkpoint.keep", "checkpoint.keep_best", "checkpoint.keep_best_goal"),
    *("data.prefetch", "data.workers", "data.storage", "train.log_every", "train.nonfinite", "train.recompute"),
    "train.evaluate_batch",
    # how the model is spread, except for lossy compression
    *(f"parallel.{key}" for key in ("strategy", "tensor", "sequence", "replicas", "reshard", "reduce", "offload")),
    *(f"parallel.{key}" for key in ("bucket_mb", "static_graph", "deepspeed")),
    *(f"parallel.{key}" for key in ("pipeline", "pipeline_schedule", "pipeline_chunks")),
)


@dataclass(frozen=True)
class Record:
    """``run.json``: what the run is and how far it is.

    Attributes:
        id: unique; also the W&B run's id.
        name: the job's name.
        state: "running" also when the launcher was killed; its driver tells.
        started: Unix time of the first launch in seconds.
        job: the resolved job; empty for a script.
        command: the command line of the last launch.
        generations: how often ranks have been started.
        step: completed optimizer steps that are in the metrics.
        origin: the folder with another run's checkpoints that it was told to start from; or empty.
        init: the folder with checkpoints that it took its first weights from; or empty.
        driver: the process of the last launch.
        logs: the folder of the ranks' logs.
        ranks_per_node: how many ranks a node has had, each with the first generation that it is true of.
        submission: the key of the submitted job whose launch was the last; or empty.
        chosen: what was chosen for it where its strategy was 'auto', by dotted key.
    """

    id: str
    name: str
    state: State = "running"
    started: float = 0.0
    job: dict[str, Any] = field(default_factory=dict[str, Any])
    command: tuple[str, ...] = ()
    generations: int = 0
    step: int = 0
    origin: str = ""
    init: str = ""
    driver: Driver | None = None
    logs: str = ""
    ranks_per_node: tuple[tuple[int, int], ...] = ()
    submission: str = ""
    chosen: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, run: Path) -> Self | None:
        """The record in a run directory; None where there is none, or it is damaged."""
        try:
            data: dict[str, Any] = json.loads((run / "run.json").read_text())
            data["command"] = tuple(data["command"])
            data["ranks_per_node"] = tuple((first, count) for first, count in data.get("ranks_per_node", ()))
            data["driver"] = Driver.from_json(data["driver"]) if data.get("driver") else None
            return cls(**data)
        except (OSError, ValueError, TypeError, KeyError):
            return None


class RunDir:
    """An open run directory. This process holds its lock until :meth:`close`."""

    def __init__(self, path: Path, record: Record, lock: int) -> None:
        self.path = path
        self.record = record
        self._lock = lock

    @classmethod
    def create(cls, parent: Path, name: str, job: Mapping[str, Any], *, origin: str = "", init: str = "") -> Self:
        """A new run directory with the next free number.

        Raises:
            JobError: the parent cannot be written.
        """
        home = parent.absolute() / name
        try:
            home.mkdir(parents=True, exist_ok=True)
            number = max((int(p.name) for p in home.iterdir() if p.name.isdecimal()), default=0) + 1
            while True:
                try:
                    (home / f"{number:04d}").mkdir()
                    break
                except FileExistsError:
                    number += 1
        except OSError as error:
            raise JobError(Problem(f"{home} cannot be written: {error.strerror}", "--run-dir")) from None
        path = home / f"{number:04d}"
        try:
            lock = _try_lock(path)
        except JobError:
            path.rmdir()
            raise
        assert lock is not None, "a new folder has no other owner"
        record = Record(secrets.token_hex(4), name, started=time.time(), job=dict(job), origin=origin, init=init)
        record = replace(record, driver=Driver.here())
        run = cls(path, record, lock)
        try:
            run.update()
            _point_latest(home, path)
        except (OSError, RunFailed) as error:
            run.discard()
            raise JobError(Problem(str(error), "--run-dir")) from None
        return run

    @classmethod
    def reopen(cls, path: Path) -> Self | None:
        """An existing run directory; None when another launcher is using it, or it is none."""
        record = Record.read(path)
        if record is None:
            return None
        lock = _try_lock(path)
        return cls(path, record, lock) if lock is not None else None

    @property
    def number(self) -> str:
        return self.path.name

    def update(self, **changes: Any) -> None:
        """Change fields of the record and write it."""
        self.restore(replace(self.record, **changes))

    def restore(self, record: Record) -> None:
        """Put ``record`` in place of the present one and write it."""
        self.record = record
        self.write("run.json", json.dumps(asdict(record), indent=2) + "\n")

    def read(self, name: str) -> str:
        """The text of a file of the run directory; empty where there is none."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def write(self, name: str, text: str, *, sync: bool = True) -> None:
        """Write a file of the run directory as a whole: temporary name, sync, rename.

        Args:
            sync: wait until it is on the disk; without, a crash of the machine may lose or empty it.

        Raises:
            RunFailed: it cannot be written, because the disk is full, say. What was there before stays.
        """
        target = self.path / name
        partial = target.with_name(target.name + ".partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            partial.rename(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise RunFailed(f"{target} cannot be written: {error.strerror or error}") from error

    def discard(self) -> None:
        """Remove the run as if it had never been, and release the lock."""
        home = self.path.parent
        (home / "latest").unlink(missing_ok=True)
        shutil.rmtree(self.path)
        self.close()
        before = newest_run(home.parent, home.name)
        if before is not None:
            _point_latest(home, before)
        else:
            with contextlib.suppress(OSError):  # somebody else's file is in it
                home.rmdir()

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)


def _try_lock(path: Path) -> int | None:
    """Hold the run for the life of this process; None if another process does.

    On a file and not on the folder, since network file systems share only locks of files among machines (flock(2)). On
    one without locks nothing is held.

    Raises:
        JobError: the folder cannot be written.
    """
    try:
        fd = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise JobError(Problem(f"{path} cannot be written: {error.strerror}", "--run-dir")) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        pass
    return fd


def _point_latest(home: Path, path: Path) -> None:
    link = home / f".latest-{secrets.token_hex(4)}"
    link.symlink_to(path.name)
    link.rename(home / "latest")


def check_parent(parent: Path) -> None:
    """Refuse a parent of run directories that cannot be written, as far as that can be told without writing.

    Raises:
        JobError: it cannot.
    """
    folder = parent.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise JobError(Problem(f"{folder} is no folder", "--run-dir"))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise JobError(Problem(f"{folder} cannot be written", "--run-dir", "name another folder"))


def newest_run(parent: Path, name: str) -> Path | None:
    """The run directory of ``name`` with the highest number, if there is one."""
    home = parent.absolute() / name
    numbered = [path for path in home.iterdir() if path.name.isdecimal()] if home.is_dir() else []
    return max(numbered, key=lambda path: int(path.name), default=None)


def differences(job: Job, earlier: Mapping[str, Any]) -> list[str]:
    """Dotted keys by which ``job`` would compute something else than ``earlier`` (a dumped job)."""
    ours, theirs = _flat(job.model_dump(mode="json")), _flat(earlier)
    free = tuple(f"{key}." for key in _FREE)
    if job.parallel.is_open and job.train.microbatches == "auto":
        free += ("train.microbatches.",)  # they may be chosen with the strategy
    keys = sorted(ours.keys() | theirs.keys())
    return [k for k in keys if ours.get(k) != theirs.get(k) and not f"{k}.".startswith(free)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))  # pyright: ignore[reportUnknownArgumentType]  # JSON
        else:
            flat[prefix + key] = value
    return flat


def describe_environment(hosts: list[dict[str, Any]]) -> dict[str, Any]:
    """Versions, git state of the working directory, and hosts: what ``environment.json`` holds. No secrets."""
    packages = ("dltrain", "torch", "ray", "numpy", "wandb", "fsspec", "safetensors", "pydantic")
    versions: dict[str, str] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "launched_from": socket.gethostname(),
        "working_directory": str(Path.cwd()),
        "versions": versions,
        "git": _git_state(),
        "hosts": hosts,
    }


def _git_state() -> dict[str, Any] | None:
    def git(*args: str) -> str:
        command = ["git", "-c", "core.fsmonitor=false", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": commit, "branch": git("rev-parse", "--abbrev-ref", "HEAD"), "changed_files": len(changed)}
    except (OSError, subprocess.SubprocessError):
        return None
