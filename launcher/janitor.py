"""Leaving nothing behind: end the processes of a Ray session that lost its launcher, and remove its folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path


def sweep(folder: Path, *, patience: float = 5.0) -> None:
    """Kill every process of this user that has a file open in ``folder``, then remove the folder.

    Ray's helpers outlive a killed launcher by many seconds, and carry no other mark of their session than their logs.
    """
    deadline = time.monotonic() + patience
    while (pids := users_of(folder)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def users_of(folder: Path) -> set[int]:
    """Other processes with an open file or their working directory below ``folder`` (proc(5))."""
    inside = f"{folder}{os.sep}"
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended, or is another user's
                links = [*(entry / "fd").iterdir(), entry / "cwd"]
                if any(_target(link).startswith(inside) for link in links):
                    found.add(int(entry.name))
    return found


def _target(link: Path) -> str:
    with contextlib.suppress(OSError):
        return str(link.readlink())
    return ""
