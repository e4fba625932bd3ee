"""Goodput: the share of a run's wall time that was spent computing optimizer steps, and where the rest went."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.rows import RunRow
from .stragglers import Stragglers


@dataclass
class Goodput:
    """Adds up a run's time. All times in seconds; ``began`` is the Unix time at which the command started."""

    began: float
    compute: float = 0.0
    wait: float = 0.0
    straggle: float = 0.0
    evaluate: float = 0.0
    checkpoint: float = 0.0
    recovery: float = 0.0
    """From the last row before a failure to the first step after it, and steps that had been done before."""
    stragglers: Stragglers = field(default_factory=Stragglers)
    first_step: float | None = None
    last_step: float | None = None
    _restarting: bool = False
    _tail: float = 0.0
    """Of the time after the last row, what is counted elsewhere."""

    def restart(self) -> None:
        """All ranks start again: the time until their next row is lost."""
        self._restarting = True

    def take(self, row: RunRow, *, again: bool = False) -> None:
        """Count a row; ``again`` if the run had got beyond its step before."""
        self.stragglers.take(row)
        begin = row.at - row.compute - row.wait - row.evaluate - row.checkpoint
        if self.first_step is None or self.last_step is None:
            self.first_step = begin
        elif self._restarting:
            self.recovery += max(0.0, begin - self.last_step - self._tail)
        self._restarting, self._tail = False, 0.0
        self.last_step = row.at
        if again:
            self.recovery += row.compute + row.wait + row.evaluate + row.checkpoint
        else:
            self.compute += row.compute - row.straggle
            self.straggle += row.straggle
            self.wait += row.wait
            self.evaluate += row.evaluate
            self.checkpoint += row.checkpoint

    def end(self, *, evaluate: float, checkpoint: float) -> None:
        """Count what came after the last row: the last evaluation, and the wait for the last checkpoint."""
        self.evaluate += evaluate
        self.checkpoint += checkpoint
        self._tail = evaluate + checkpoint

    def shares(self, now: float) -> dict[str, float]:
        """Seconds by cause; they add up to the wall time until ``now``."""
        wall = now - self.began
        if self.first_step is None or self.last_step is None:
            return {"start-up": wall}
        begun, ended = self.first_step - self.began, max(0.0, now - self.last_step - self._tail)
        found = {
            "steps": self.compute,
            "start-up": begun,
            "data wait": self.wait,
            "straggler wait": self.straggle,
            "evaluation": self.evaluate,
            "checkpoint stall": self.checkpoint,
            **({"recovery": self.recovery} if self.recovery else {}),
            "end": ended,
        }
        return found | {"other": max(0.0, wall - sum(found.values()))}

    def ratio(self, now: float) -> float:
        """Productive step time over wall time, in [0, 1]."""
        wall = now - self.began
        return min(1.0, self.compute / wall) if wall > 0 else 0.0
