"""How ranks agree to stop, or to save, at the same step, without a collective in every step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .marks import Progress


@dataclass(frozen=True)
class Wishes:
    """What a rank wants, or all of them together.

    Attributes:
        stop: end the training here.
        save: a checkpoint now.
        reassign: settle anew who copies what into memory.
        every: steps between snapshots in memory; 0 where that is not known.
        copies: how far the copies of a snapshot on other nodes are; of all ranks, the least.
    """

    stop: bool = False
    save: bool = False
    reassign: bool = False
    every: int = 0
    copies: Progress = Progress.COPYING


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

    def ask(self, step: int, mine: Wishes) -> Wishes:
        """What any rank wants before ``step``, the largest number, the least progress. Collective, at the same step."""
        now = time.monotonic()
        pace = (now - self._asked_at) / (step - self._asked_step)
        ahead = max(1, min(int(self._interval / max(pace, 1e-6)), 2 * (step - self._asked_step)))
        wanted = mine
        if self._world > 1:
            flags = [int(mine.stop), int(mine.save), int(mine.reassign)]
            answer = torch.tensor([*flags, mine.every, -mine.copies, -ahead], dtype=torch.int64)
            dist.all_reduce(answer, op=dist.ReduceOp.MAX)
            stop, save, reassign, every, copies, negative = (int(value) for value in answer.tolist())
            wanted = Wishes(bool(stop), bool(save), bool(reassign), every, Progress(-copies))
            ahead = -negative
        self._asked_at, self._asked_step, self._next = now, step, step + ahead
        return wanted
