"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from ..core.train import Schedule

_RISE, _FROM, _TO = 0.3, 1 / 25, 1 / 250_000  # of torch's OneCycleLR: pct_start, 1 / div_factor, and the end


def rate(schedule: Schedule, *, step: int, total_steps: int, falls: int = 0) -> float:
    """The share of the peak learning rate at optimizer step ``step`` (from 0) of ``total_steps``, in [0, 1].

    Linear warm-up from ``1 / (warmup_steps + 1)``, then

    - constant: 1.
    - cosine: half a cosine down to ``floor`` at ``total_steps`` (Loshchilov & Hutter 2017, "SGDR", without restarts).
    - step: ``factor`` to the number of times that ``every`` steps have passed since the warm-up.
    - plateau: ``factor ** falls``; the caller counts the falls.

    one_cycle (Smith & Topin 2018, "Super-convergence") needs no warm-up: the rise takes ``warmup_steps``, or 30 % of
    the run where that is 0, along half a cosine from 1/25 of the peak; the fall ends at 1/250,000 of it. As torch's
    OneCycleLR, with the momentum left alone.
    """
    warmup = schedule.warmup_steps
    if schedule.name == "one_cycle":
        return _one_cycle(step, warmup or _RISE * total_steps, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    match schedule.name:
        case "constant":
            return 1.0
        case "cosine":
            progress = (step - warmup) / max(1, total_steps - warmup)
            return schedule.floor + (1 - schedule.floor) * _half_cosine(progress)
        case "step":
            return schedule.factor ** ((step - warmup) // schedule.every)
        case "plateau":
            return schedule.factor**falls


def _one_cycle(step: int, rise: float, total_steps: int) -> float:
    top, last = rise - 1, total_steps - 1
    if step <= top:
        return _FROM + (1 - _FROM) * (1 - _half_cosine(step / top if top > 0 else 1.0))
    return _TO + (1 - _TO) * _half_cosine((step - top) / max(1.0, last - top))


def _half_cosine(progress: float) -> float:
    """From 1 to 0 as ``progress`` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))
