"""The engine over plain torch: one process, or DistributedDataParallel over several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.contracts import Batch, Engine, Recipe, Shard, ShardedState, StepResult

#: Called with the phase that begins: "forward", "backward", "optimizer".
Mark = Callable[[str], None]
#: Called before each microbatch's forward with (step, microbatch); seeds all randomness.
Reseed = Callable[[int, int], None]


class TorchEngine(Engine):
    """Trains a recipe's parts one after the other, each with an optimizer of its own.

    Gradients of a step are the mean over the step's samples, whichever rank computed them: each microbatch's mean loss
    is scaled by its weight (and by the number of ranks, since DDP averages over them).
    """

    def __init__(
        self,
        recipe: Recipe,
        wrapped: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        *,
        data_ranks: int,
        clip_norm: float | None,
        reseed: Reseed,
        mark: Mark,
    ) -> None:
        self._recipe = recipe
        self._parts = dict(wrapped)
        self._optimizers = dict(optimizers)
        self._data_ranks = data_ranks
        self._clip_norm = clip_norm
        self._reseed = reseed
        self._mark = mark

    def step(self, microbatches: Sequence[Batch], lr: float) -> StepResult:
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        for part, optimizer in self._optimizers.items():
            optimizer.zero_grad(set_to_none=True)
            losses[part] = self._accumulate(part, microbatches)
            self._mark("optimizer")
            if self._clip_norm is not None:
                norms[part] = nn.utils.clip_grad_norm_(self._parts[part].parameters(), self._clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        return StepResult(losses, norms)

    def _accumulate(self, part: str, microbatches: Sequence[Batch]) -> Tensor:
        """Forward and backward over all microbatches; this rank's share of the step's mean loss."""
        module = self._parts[part]
        total: Tensor | None = None
        for batch in microbatches:
            last = batch is microbatches[-1]
            self._reseed(batch.step, batch.index)
            with _reduction(module, last):
                self._mark("forward")
                loss = self._recipe.loss(part, self._parts, batch)
                self._mark("backward")
                scale = batch.weight * self._data_ranks
                loss.backward(None if scale == 1 else torch.full_like(loss, scale))
            share = loss.detach().float() * batch.weight
            total = share if total is None else total + share
        assert total is not None, "a rank without microbatches"
        return total

    def share_buffers(self) -> None:
        for module in self._parts.values():
            if isinstance(module, DistributedDataParallel) and module.modules_buffers:
                module._sync_buffers()  # pyright: ignore[reportPrivateUsage]  # what DDP does before a forward pass

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        modules = {part: _unwrapped(module) for part, module in self._parts.items()}
        for module in modules.values():
            module.eval()
        try:
            with torch.inference_mode():
                return self._recipe.metrics(modules, batch)
        finally:
            for module in modules.values():
                module.train()

    def state(self) -> ShardedState:
        return {name: Shard(tuple(t.shape), (0,) * t.dim(), t) for name, t in self._tensors()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for optimizer in self._optimizers.values():
            _materialize(optimizer)
        for name, tensor in self._tensors():
            if name not in state:
                raise KeyError(name)
            with torch.no_grad():
                tensor.copy_(state[name])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for part, wrapped in self._parts.items():
            module = _unwrapped(wrapped)
            for name, tensor in module.state_dict(keep_vars=True).items():
                yield f"model.{part}.{name}", tensor.detach()
            optimizer = self._optimizers[part]
            for name, parameter in module.named_parameters():
                for slot, value in sorted(optimizer.state.get(parameter, {}).items()):
                    if isinstance(value, Tensor):
                        yield f"optimizer.{part}.{name}.{slot}", value


def _reduction(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Gradients are reduced in the backward of a step's last microbatch only."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def _unwrapped(module: nn.Module) -> nn.Module:
    return cast(nn.Module, module.module) if isinstance(module, DistributedDataParallel) else module


def _materialize(optimizer: torch.optim.Optimizer) -> None:
    """Create an optimizer's state tensors without changing a weight: one step with zero gradients and rate zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate, decay in zip(optimizer.param_groups, rates, decays, strict=True):
        group["lr"], group["weight_decay"] = rate, decay
