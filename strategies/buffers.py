"""Buffers, such as running averages, over steps that are to change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..core.job import Job


class Buffers:
    """The buffers of modules that checkpoints have.

    Forward passes write to them, and only afterwards it is known whether their step counts: statistics of samples that
    are not finite would never become finite again.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places = [
            (owner, name)
            for module in modules
            for owner in module.modules()
            for name in owner._buffers
            if name not in owner._non_persistent_buffers_set
        ]

    @classmethod
    def at_stake(cls, job: Job, modules: Iterable[nn.Module]) -> Buffers:
        """Those of ``modules`` if steps of ``job`` may be skipped, else none."""
        return cls(modules if job.train.nonfinite == "skip" or job.train.precision == "fp16" else ())

    def keep(self) -> list[Tensor | None]:
        """What they hold now."""
        return [None if buffer is None else buffer.detach().clone() for buffer in self._now()]

    @torch.no_grad()
    def put_back(self, kept: Sequence[Tensor | None]) -> None:
        for buffer, value in zip(self._now(), kept, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)

    def _now(self) -> list[Tensor | None]:
        return [owner._buffers[name] for owner, name in self._places]
