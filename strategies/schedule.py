"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from ..core.job import Schedule


def learning_rate(schedule: Schedule, *, peak: float, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0) out of ``total_steps``.

    Linear warm-up from ``peak / (warmup_steps + 1)``, then constant or half a cosine down to zero at ``total_steps``
    (Loshchilov & Hutter 2017, "SGDR", without restarts).
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule.name == "constant":
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
