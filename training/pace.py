"""How often a snapshot stays in memory: as often as it costs next to nothing, or as the job says."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Literal

_SHARE = 0.01  # of the step time that snapshots may take
_WARM = 3  # snapshots one after the other at first: those into new pages say nothing of the others
_LATEST = 5  # measurements that count
_WHILE_UNKNOWN = 1 << 40  # steps until the next one, as long as the ranks have not agreed
_WEIGHT = 0.1  # of the latest step in the mean step time


class Pace:
    """Every how many steps one is due. The same on all ranks, who measure their own and agree now and then.

    Args:
        every: what the job says (``recovery.snapshot``).
        start: completed steps at the beginning.
    """

    def __init__(self, every: int | Literal["auto", "never"], *, start: int) -> None:
        self._auto = every == "auto"
        self._every = every if isinstance(every, int) else 0
        self._next = None if every == "never" else start + (self._every or 1)
        self._last = start
        self._taken = 0
        self._costs: deque[float] = deque(maxlen=_LATEST)
        self._step = 0.0

    def due(self, done: int) -> bool:
        """Whether one is due after ``done`` steps."""
        return self._next is not None and done >= self._next

    def stepped(self, seconds: float) -> None:
        """A step took this long."""
        self._step += (seconds - self._step) * (_WEIGHT if self._step else 1.0)

    def taken(self, done: int, seconds: float | None) -> None:
        """One was taken after ``done`` steps, and training waited this long for it; None where this rank took none."""
        if self._next is None:
            return
        self._taken += 1
        if self._taken >= _WARM and seconds is not None:
            self._costs.append(seconds)
        self._last = done
        self._next = done + (1 if self._auto and self._taken < _WARM else self._every or _WHILE_UNKNOWN)

    @property
    def wanted(self) -> int:
        """Steps between two by this rank's measurements; 0 where there are none."""
        if not self._auto or not self._costs or not self._step:
            return 0
        return max(1, math.ceil(median(self._costs) / (_SHARE * self._step)))

    def agree(self, every: int) -> None:
        """Take over what all ranks have agreed on; 0 changes nothing."""
        if self._auto and every:
            self._every = every
            if self._taken >= _WARM:
                self._next = self._last + every
