"""Processes of this machine that another one looks after: told apart for good, looked at, and signalled safely."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_GONE = ("", "Z", "X")


@dataclass(frozen=True)
class Process:
    """A process by its number and its start, which together no other process ever has.

    Attributes:
        pid: its number, in this process's namespace.
        started: when it started, in clock ticks since the machine did (proc(5)).
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The process that has this number now, if there is one."""
        fields = _stat(pid)
        return cls(pid, int(fields[19])) if fields else None

    @property
    def state(self) -> str:
        """The kernel's letter for what it does: R runs, S sleeps, D waits for a device, T is stopped; "" is gone."""
        fields = _stat(self.pid)
        return fields[0] if fields and int(fields[19]) == self.started else ""

    @property
    def alive(self) -> bool:
        return self.state not in _GONE

    @property
    def foreign(self) -> bool:
        """Whether it is another user's, which this process may not signal."""
        try:
            self.signal(0)
        except PermissionError:
            return True
        return False

    def signal(self, signum: int) -> bool:
        """Send a signal to this process alone, and never to a later one with its number; whether it was there.

        Raises:
            PermissionError: it is another user's.
        """
        with suppress(ProcessLookupError):
            fd = os.pidfd_open(self.pid)  # whoever has the number now; if that is still this one after, it was before
            try:
                if self.alive:
                    signal.pidfd_send_signal(fd, signum)
                    return True
            finally:
                os.close(fd)
        return False


@dataclass(frozen=True)
class Driver:
    """The process that drives a run.

    Attributes:
        host: name of its machine.
        boot: the machine's present start (random(4)).
        namespace: what process numbers are good for there (pid_namespaces(7)).
        process: the process there.
        since: Unix time in seconds at which it took up the run.
    """

    host: str
    boot: str
    namespace: str
    process: Process
    since: float

    @classmethod
    def here(cls) -> Self:
        """This process, from now on."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Self:
        """A process that this one has started and not waited for, from now on."""
        process = Process.of(pid)
        assert process is not None
        return cls(socket.gethostname(), boot(), namespace(), process, time.time())

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        fields: dict[str, Any] = {**data, "process": Process(**data["process"])}
        return cls(**fields)

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, where this process can see it."""
        return (self.boot, self.namespace) == (boot(), namespace())

    @property
    def gone(self) -> bool:
        """Whether it has ended for certain: as this process sees, or with an earlier start of this machine."""
        if self.is_here:
            return not self.process.alive
        return self.host == socket.gethostname() and self.boot != boot()


def name_of(pid: int) -> str:
    """The name that ``ps`` shows of a process, 15 bytes of it (proc(5)); empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """What proc(5) says of a process from its state (field 3) on; nothing when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name in parentheses may hold anything


def boot() -> str:
    """What tells this start of the machine from all others (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def namespace() -> str:
    """What this process's process numbers are good for (pid_namespaces(7))."""
    return str(Path("/proc/self/ns/pid").readlink())
