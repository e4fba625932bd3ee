"""A command and all that it starts, found by a mark in the environment."""

from __future__ import annotations

import os
import secrets
import signal
from pathlib import Path


def new_mark() -> str:
    """A variable, as ``NAME=value``, for a command's environment; whatever the command starts inherits it."""
    return f"BENCH_MARK={secrets.token_hex(8)}"


def marked(mark: str) -> list[Path]:
    """The /proc folders of the processes whose environment carries ``mark``."""
    found: list[Path] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(entry)
            except OSError:
                continue
    return found


def send(mark: str, signum: signal.Signals) -> None:
    """Signal every marked process."""
    for entry in marked(mark):
        try:
            os.kill(int(entry.name), signum)
        except ProcessLookupError:
            continue
