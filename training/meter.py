"""What a rank's steps took, added up between two rows of metrics."""

from __future__ import annotations

import time
from typing import Any

from ..core.contracts import StepResult
from ..core.pulse import Pulse
from ..core.rows import Row
from ..data.order import StepPlan

_BETWEEN = ("evaluate", "checkpoint")


class Meter:
    """Reads the pulse's times by phase, so that nothing is timed twice."""

    def __init__(self, plan: StepPlan, pulse: Pulse) -> None:
        self._plan, self._pulse = plan, pulse
        self._between = {phase: pulse.spent(phase) for phase in _BETWEEN}
        self._clear()

    def _clear(self) -> None:
        self._steps, self._samples, self._seconds, self._wait, self._own = 0, 0, 0.0, 0.0, 0.0

    def begin(self) -> None:
        """A step begins."""
        self._begun, self._before = time.monotonic(), self._alone()

    def add(self, step: int, *, wait: float) -> None:
        """A step has ended, ``wait`` seconds of which were spent waiting for data."""
        self._steps += 1
        self._samples += self._plan.samples_before(step + 1) - self._plan.samples_before(step)
        self._seconds += time.monotonic() - self._begun
        self._wait += wait
        # Gradients are reduced in the last backward pass: up to there a rank is as fast as it is, then as the slowest.
        self._own += self._alone() - self._before - self._pulse.last("backward")

    def _alone(self) -> float:
        return sum(self._pulse.spent(phase) for phase in ("data", "forward", "backward"))

    def between(self) -> dict[str, float]:
        """Seconds since the last row, by phase between steps."""
        return {phase: self._pulse.spent(phase) - before for phase, before in self._between.items()}

    def row(self, done: int, result: StepResult, lr: float, *, alone: bool) -> Row:
        """This rank's row after ``done`` steps; the sums begin anew."""
        row: Row = {
            "step": done,
            "loss": {part: float(loss) for part, loss in result.loss.items()},
            "norm": {part: float(norm) for part, norm in result.grad_norm.items()},
            "loss_scale": {part: found.factor for part, found in result.scaling.items()},
            "alone": alone,
            "samples": self._samples,
            "steps": self._steps,
            "seconds": self._seconds,
            "wait": self._wait,
            "own": self._own,
            **self.between(),
            "at": time.time(),
            "lr": lr,
            "epoch": self._plan.samples_before(done) / self._plan.n,
            "metrics": dict[str, Any](),
        }
        self._between = {phase: self._pulse.spent(phase) for phase in _BETWEEN}
        self._clear()
        return row
