"""What a rank measures of its steps, for the rows of metrics."""

from __future__ import annotations

import time

from ..core.contracts import StepResult
from ..core.rows import Row
from ..data.order import StepPlan


class Meter:
    """Adds up step times between two rows of metrics."""

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        self._clear()

    def _clear(self) -> None:
        self._steps, self._samples, self._seconds, self._wait = 0, 0, 0.0, 0.0

    def add(self, step: int, *, seconds: float, wait: float) -> None:
        self._steps += 1
        self._samples += self._plan.samples_before(step + 1) - self._plan.samples_before(step)
        self._seconds += seconds
        self._wait += wait

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
            "at": time.time(),
            "lr": lr,
            "epoch": self._plan.samples_before(done) / self._plan.n,
            "metrics": {},
        }
        self._clear()
        return row
