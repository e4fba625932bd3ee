"""When a checkpoint is due: every so many steps, or every so many seconds by rank 0's clock."""

from __future__ import annotations

import time

from ..core.job import CheckpointSpec
from ..core.spec import parse_duration


class Due:
    """The clock runs from the last checkpoint, or from when this was made."""

    def __init__(self, spec: CheckpointSpec) -> None:
        self._steps = spec.every if isinstance(spec.every, int) else None
        self._seconds = parse_duration(spec.every) if isinstance(spec.every, str) else None
        self._at = time.monotonic()

    def after(self, done: int) -> bool:
        """Whether one is due after ``done`` steps. The same on every rank."""
        return self._steps is not None and done % self._steps == 0

    def by_clock(self) -> bool:
        """Whether the time has come by this rank's clock."""
        return self._seconds is not None and time.monotonic() - self._at >= self._seconds

    def taken(self) -> None:
        self._at = time.monotonic()
