"""Goodput: the share of a run's wall time that was spent computing optimizer steps, and where the rest went."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.rows import RunRow


@dataclass
class Goodput:
    """Adds up a run's time. All times in seconds; ``began`` is the Unix time at which the command started."""

    began: float
    compute: float = 0.0
    wait: float = 0.0
    restarts: float = 0.0
    """From the last row before a failure to the first step after it, and steps that had been done before."""
    first_step: float | None = None
    last_step: float | None = None
    _restarting: bool = False

    def restart(self) -> None:
        """All ranks start again: the time until their next row is lost."""
        self._restarting = True

    def take(self, row: RunRow, *, again: bool = False) -> None:
        """Count a row; ``again`` if the run had got beyond its step before."""
        begin = row.at - row.compute - row.wait
        if self.first_step is None or self.last_step is None:
            self.first_step = begin
        elif self._restarting:
            self.restarts += max(0.0, begin - self.last_step)
        self._restarting = False
        self.last_step = row.at
        if again:
            self.restarts += row.compute + row.wait
        else:
            self.compute += row.compute
            self.wait += row.wait

    def shares(self, now: float) -> dict[str, float]:
        """Seconds by cause; they add up to the wall time until ``now``."""
        wall = now - self.began
        if self.first_step is None or self.last_step is None:
            return {"start-up": wall}
        start = self.first_step - self.began
        end = now - self.last_step
        between = max(0.0, wall - start - end - self.compute - self.wait - self.restarts)
        return {
            "steps": self.compute,
            "start-up": start,
            "data wait": self.wait,
            "evaluation and checkpoints": between,
            **({"restarts": self.restarts} if self.restarts else {}),
            "end": end,
        }

    def ratio(self, now: float) -> float:
        """Productive step time over wall time, in [0, 1]."""
        wall = now - self.began
        return min(1.0, self.compute / wall) if wall > 0 else 0.0
