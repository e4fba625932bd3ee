"""A rank's pulse: step and phase in a page of memory shared with its agent.

Writing it costs a fraction of a microsecond and no system call, so a rank can mark every phase of every step, and the
agent still sees the last mark of a rank that hangs.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass

PHASES = (
    "start",
    "setup",
    "data",
    "forward",
    "backward",
    "optimizer",
    "evaluate",
    "checkpoint",
    "snapshot",
    "user",
    "end",
)
_LAYOUT = struct.Struct("=qqd")
_PHASE_ID = {name: i for i, name in enumerate(PHASES)}


@dataclass(frozen=True)
class Beat:
    """The last mark: optimizer step (-1 before the first), phase, and its time (``time.monotonic()`` seconds)."""

    step: int
    phase: str
    at: float


class Pulse:
    """One rank's page. The agent makes it and hands its descriptor to the rank; only the rank writes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._page = mmap.mmap(fd, mmap.PAGESIZE)
        self.step = -1
        self._phase, self._since = _PHASE_ID["start"], time.monotonic()
        self._spent = [0.0] * len(PHASES)
        self._last = [0.0] * len(PHASES)

    @classmethod
    def create(cls) -> Pulse:
        """A new anonymous page (it has no name, so nothing can be left behind)."""
        fd = os.memfd_create("dltrain-pulse")
        os.ftruncate(fd, mmap.PAGESIZE)
        pulse = cls(fd)
        pulse.mark("start")
        return pulse

    def mark(self, phase: str, step: int | None = None) -> None:
        """Write where this rank is now."""
        if step is not None:
            self.step = step
        now = time.monotonic()
        stretch = now - self._since
        self._spent[self._phase] += stretch
        self._last[self._phase] = stretch
        self._phase, self._since = _PHASE_ID[phase], now
        _LAYOUT.pack_into(self._page, 0, self.step, self._phase, now)

    def spent(self, phase: str) -> float:
        """Seconds that this process has been in a phase, before its last mark."""
        return self._spent[_PHASE_ID[phase]]

    def last(self, phase: str) -> float:
        """Seconds that it was there the last time."""
        return self._last[_PHASE_ID[phase]]

    def read(self) -> Beat:
        values: tuple[int, int, float] = _LAYOUT.unpack_from(self._page, 0)
        return Beat(values[0], PHASES[values[1]], values[2])

    def close(self) -> None:
        self._page.close()
        os.close(self.fd)
