"""How ranks agree to stop, or to save, at the same step, without a collective in every step."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist


class Agreement:
    """Every half second or so, at a step that all ranks know, one tiny all-reduce asks what anybody wants.

    The step of the next question is part of the answer to the last one, so it is the same on every rank although each
    measures its own speed.
    """

    def __init__(self, *, world: int, step: int, interval: float = 0.5) -> None:
        self._world = world
        self._interval = interval
        self._asked_at = time.monotonic()
        self._asked_step = step
        self._next = step + 1

    def due(self, step: int) -> bool:
        """Whether the question stands before step ``step``."""
        return step >= self._next

    def ask(self, step: int, *, stop: bool, save: bool) -> tuple[bool, bool]:
        """Whether any rank wants to stop, and to save, before ``step``. Collective: all ask at the same step."""
        now = time.monotonic()
        pace = (now - self._asked_at) / (step - self._asked_step)
        ahead = max(1, min(int(self._interval / max(pace, 1e-6)), 2 * (step - self._asked_step)))
        if self._world > 1:
            answer = torch.tensor([int(stop), int(save), -ahead], dtype=torch.int64)
            dist.all_reduce(answer, op=dist.ReduceOp.MAX)
            stop, save, ahead = bool(answer[0]), bool(answer[1]), -int(answer[2])
        self._asked_at, self._asked_step, self._next = now, step, step + ahead
        return stop, save
