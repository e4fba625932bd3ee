"""The strategy 'ddp': the whole model on every rank, gradients averaged while they are computed."""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ..core.parallel import Parallel
from .spread import Spread


class Ddp(Spread):
    """Torch's DistributedDataParallel over all ranks."""

    def __init__(self, module: nn.Module, parallel: Parallel, device: torch.device) -> None:
        wrapped = DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            bucket_cap_mb=parallel.bucket_mb,
            gradient_as_bucket_view=True,
            static_graph=parallel.static_graph,
        )
        if not parallel.static_graph:  # which learns in its first backward which parameters are used, and how often
            _lay_out_buckets(wrapped)
        match parallel.compress:
            case "bf16":
                wrapped.register_comm_hook(None, _bf16_hook)
            case "powersgd":
                wrapped.register_comm_hook(
                    PowerSGDState(
                        None,
                        matrix_approximation_rank=parallel.powersgd_rank,
                        start_powerSGD_iter=parallel.powersgd_start,
                    ),
                    powerSGD_hook,
                )
            case "none":
                pass
        self.module = self.helping = module  # a wrapper that only helped would wait for gradients that never come
        self.trained = self._wrapped = wrapped
        self._learns_graph = parallel.static_graph

    def reducing(self, last: bool) -> contextlib.AbstractContextManager[object]:
        if self._learns_graph:  # the first backward must reduce; the mean of a mean and of later gradients is the same
            last, self._learns_graph = True, False
        return contextlib.nullcontext() if last else self._wrapped.no_sync()

    def rest(self) -> None:
        """Weights are whole everywhere."""


def _lay_out_buckets(wrapped: DistributedDataParallel) -> None:
    """Have the wrapper find its buckets now: the last parameter first, as a backward pass mostly comes by them.

    By itself it has one bucket in its first backward pass, and lays out others in the order in which the gradients of
    that pass arrived. With more than two ranks a bucket's layout decides in which order a gradient's terms are added
    up: the first step after every start would be rounded in another way than the same step of a run that went on.
    """
    module = wrapped.module
    wrapped.module = _OneAfterAnother(module)
    wrapped().backward()
    wrapped.module = module
    for weight in module.parameters():
        weight.grad = None


class _OneAfterAnother(nn.Module):
    """Zero, computed from a module's parameters such that backward gives their gradients from the last to the first."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> Tensor:
        tables = [m for m in self.module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
        sparse = {table.weight for table in tables}  # whose gradients have to be

        def used(weight: nn.Parameter) -> Tensor:
            if weight in sparse:
                row = torch.zeros(1, dtype=torch.long, device=weight.device)
                return functional.embedding(row, weight, sparse=True)
            return torch.view_as_real(weight) if weight.is_complex() else weight

        weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        return functools.reduce(lambda total, weight: total + 0 * used(weight).sum(), weights, torch.zeros(()))


def _bf16_hook(state, bucket):  # torch compares annotations with its types, and does not take text for one
    """The mean of a gradient bucket over all ranks, in bfloat16. Torch's own such hook refuses gloo."""
    small = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(small, async_op=True)
    assert work is not None, "this rank is not in the group"

    def widen(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        return bucket.buffer().copy_(done.value()[0])

    return work.get_future().then(widen)
