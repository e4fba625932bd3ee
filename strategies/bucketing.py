"""The strategy 'ddp' where tensors have no memory: what torch's C++ reducer holds and sends, by the same rules.

DistributedDataParallel's reducer reads memory addresses, so a dry run cannot build one. It deals the gradients, last
parameter first, to buckets of ``bucket_mb``; parameters' gradients become views of their bucket as
backward makes them; a bucket that is full is averaged over the ranks (Li et al. 2020, "PyTorch Distributed").
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.parallel import Parallel
from .spread import Spread


class Bucketed(Spread):
    """A part of which every rank has a copy, with its gradients in buckets. ``device`` is where they lie."""

    def __init__(self, module: nn.Module, parallel: Parallel, device: torch.device) -> None:
        self.module = self.trained = self.helping = module
        self._reduces = True
        self._half = parallel.compress == "bf16"
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        self._left: list[int] = []
        self._buckets: list[Tensor] = []
        for number, group in enumerate(deal(trained, int(parallel.bucket_mb * 2**20))):
            size = sum(weight.numel() for weight in group)
            bucket = torch.zeros(size, dtype=group[0].dtype, device=device)
            self._buckets.append(bucket)
            self._left.append(len(group))
            begin = 0
            for weight in group:
                view = bucket[begin : begin + weight.numel()].view(weight.shape)
                begin += weight.numel()
                weight.register_post_accumulate_grad_hook(
                    lambda weight, view=view, number=number: self._ready(weight, view, number)
                )
        self._counts = tuple(self._left)

    def _ready(self, weight: Tensor, view: Tensor, number: int) -> None:
        if not self._reduces:
            return
        view.copy_(weight.grad if weight.grad is not None else view)
        weight.grad = view
        self._left[number] -= 1
        if self._left[number]:
            return
        self._left[number] = self._counts[number]
        bucket = self._buckets[number]
        dist.all_reduce(bucket.to(torch.bfloat16) if self._half else bucket)

    @contextlib.contextmanager
    def reducing(self, last: bool) -> Generator[None]:
        self._reduces = last
        yield

    def rest(self) -> None:
        """Weights are whole everywhere."""


def deal(weights: Sequence[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """``weights`` in buckets of about ``limit`` bytes, in the order in which backward reaches them."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for weight in reversed(weights):
        if not buckets or size >= limit:
            buckets.append([])
            size = 0
        buckets[-1].append(weight)
        size += weight.numel() * weight.element_size()
    return buckets
