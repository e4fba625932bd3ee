"""The engine over plain torch: one process, or DistributedDataParallel over several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.contracts import Batch, DrawsSamples, Engine, Fill, Recipe, Shard, ShardedState, StepResult
from .ema import Ema

#: Called with the phase that begins: "forward", "backward", "optimizer".
Mark = Callable[[str], None]
#: Called before each forward with (step, microbatch, number of the part); seeds all randomness.
Reseed = Callable[[int, int, int], None]
#: Makes the context for one forward pass.
Precision = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class Trained:
    """A part of the recipe, ready to be trained.

    Attributes:
        module: as it is called in training: wrapped where the strategy wraps.
        optimizers: each with its peak learning rates; every trainable parameter is in one of them.
        every: it is trained in every so many steps.
    """

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    every: int = 1


class TorchEngine(Engine):
    """Trains a recipe's parts one after the other, each with optimizers of its own.

    Gradients of a step are the mean over the step's samples, whichever rank computed them: each microbatch's mean loss
    is scaled by its weight (and by the number of ranks, since DDP averages over them).
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: Mapping[str, Trained],
        *,
        data_ranks: int,
        clip_norm: float | None,
        ema: Ema | None,
        precision: Precision,
        reseed: Reseed,
        mark: Mark,
    ) -> None:
        self.parts = tuple(parts)
        self._recipe = recipe
        self._parts = dict(parts)
        self._groups = [
            (group, group["lr"]) for part in parts.values() for opt in part.optimizers for group in opt.param_groups
        ]
        self._data_ranks = data_ranks
        self._clip_norm = clip_norm
        self._ema = ema
        self._precision = precision
        self._reseed = reseed
        self._mark = mark

    def step(self, microbatches: Sequence[Batch], rate: float) -> StepResult:
        step = microbatches[0].step
        for group, peak in self._groups:
            group["lr"] = peak * rate
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            if step % part.every:
                continue
            for optimizer in part.optimizers:
                optimizer.zero_grad(set_to_none=True)
            with self._others_frozen(name):
                losses[name] = self._accumulate(name, microbatches)
            self._mark("optimizer")
            if self._clip_norm is not None:
                norms[name] = nn.utils.clip_grad_norm_(part.module.parameters(), self._clip_norm)
            for optimizer in part.optimizers:
                optimizer.step()
        if self._ema is not None:
            self._ema.update(step)
        return StepResult(losses, norms)

    @contextlib.contextmanager
    def _others_frozen(self, name: str) -> Generator[None]:
        """No gradient is computed for the weights of the parts that only help to train ``name``."""
        others = [
            parameter
            for other, part in self._parts.items()
            if other != name
            for parameter in part.module.parameters()
            if parameter.requires_grad
        ]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _accumulate(self, name: str, microbatches: Sequence[Batch]) -> Tensor:
        """Forward and backward over all microbatches; this rank's share of the step's mean loss."""
        module = self._parts[name].module
        # A helper is called without its wrapper, which would wait for gradients that never come.
        modules = {other: unwrapped(part.module) for other, part in self._parts.items()} | {name: module}
        total: Tensor | None = None
        for batch in microbatches:
            last = batch is microbatches[-1]
            self._reseed(batch.step, batch.index, self.parts.index(name))
            with _reduction(module, last):
                self._mark("forward")
                with self._precision():
                    loss = self._recipe.loss(name, modules, batch)
                self._mark("backward")
                scale = batch.weight * self._data_ranks
                loss.backward(None if scale == 1 else torch.full_like(loss, scale))
            share = loss.detach().float() * batch.weight
            total = share if total is None else total + share
        assert total is not None, "a rank without microbatches"
        return total

    def share_buffers(self) -> None:
        for part in self._parts.values():
            if isinstance(part.module, DistributedDataParallel) and part.module.modules_buffers:
                part.module._sync_buffers()  # pyright: ignore[reportPrivateUsage]  # what DDP does before a forward pass

    @contextlib.contextmanager
    def evaluating(self) -> Generator[None]:
        self.share_buffers()
        modules = [unwrapped(part.module) for part in self._parts.values()]
        for module in modules:
            module.eval()
        try:
            with self._ema.in_place() if self._ema is not None else contextlib.nullcontext():
                yield
        finally:
            for module in modules:
                module.train()

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        modules = {name: unwrapped(part.module) for name, part in self._parts.items()}
        with torch.inference_mode(), self._precision():
            return self._recipe.metrics(modules, batch)

    def samples(self) -> Mapping[str, Tensor]:
        if not isinstance(self._recipe, DrawsSamples):
            return {}
        with torch.inference_mode(), self._precision():
            return self._recipe.samples({name: unwrapped(part.module) for name, part in self._parts.items()})

    def state(self) -> ShardedState:
        return {name: Shard(tuple(t.shape), (0,) * t.dim(), t) for name, t in self._tensors()}

    def load(self, fill: Fill) -> None:
        for part in self._parts.values():
            for optimizer in part.optimizers:
                _materialize(optimizer)
        fill(self.state())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, part in self._parts.items():
            module = unwrapped(part.module)
            for fqn, tensor in module.state_dict(keep_vars=True).items():
                yield f"model.{name}.{fqn}", tensor.detach()
            states = {p: state for optimizer in part.optimizers for p, state in optimizer.state.items()}
            for fqn, parameter in module.named_parameters():
                for slot, value in sorted(states.get(parameter, {}).items()):
                    if isinstance(value, Tensor):
                        yield f"optimizer.{name}.{fqn}.{slot}", value
        if self._ema is not None:
            for fqn, average in self._ema.tensors():
                yield f"ema.{fqn}", average


def unwrapped(module: nn.Module) -> nn.Module:
    """The recipe's own module under a strategy's wrapper."""
    return cast(nn.Module, module.module) if isinstance(module, DistributedDataParallel) else module


def _reduction(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Gradients are reduced in the backward of a step's last microbatch only."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


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
