"""The embedded cluster's own processes: kept from our signals, and noticed at once when one has died all the same."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Generator
from pathlib import Path

from ..core.processes import name_of

_NAMES = ("gcs_server", "raylet")


@contextlib.contextmanager
def children_lead_groups() -> Generator[None]:
    """Processes that Ray starts meanwhile lead process groups of their own.

    A signal to our group, such as ``timeout`` sends, is a request to save a checkpoint. It must not end the daemons.
    """
    active = [True]
    # run by subprocess.Popen too where it has a preexec_fn, as Ray gives it; it cannot be unregistered
    os.register_at_fork(after_in_child=lambda: os.setpgid(0, 0) if active else None)
    try:
        yield
    finally:
        active.clear()


class Daemons:
    """Watches the processes of Ray that this process has started, through pidfd_open(2). Ray takes up to a minute."""

    def __init__(self) -> None:
        self._fds = {name: os.pidfd_open(pid) for pid in _children() if (name := name_of(pid)) in _NAMES}

    def dead(self) -> str:
        """What has died, and how, in a few words; empty while all live."""
        if not self._fds:
            return ""
        ready = select.select(list(self._fds.values()), [], [], 0)[0]
        return "; ".join(f"Ray's {name} {_end_of(fd)}" for name, fd in self._fds.items() if fd in ready)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def _end_of(fd: int) -> str:
    try:
        ended = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # Ray has asked for its status before us
        ended = None
    if ended is None:
        return "died"
    if ended.si_code == os.CLD_EXITED:
        return f"ended with exit code {ended.si_status}"
    return f"was killed by {signal.Signals(ended.si_status).name}"
