"""The engine over plain torch: one process, or copies or shards of the model on several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.contracts import Batch, DrawsSamples, Engine, Fill, Recipe, Shard, ShardedState, StepResult
from .ema import Ema
from .shards import Weight, clip_grad_norm, shard_of
from .spread import Spread

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
        spread: its module, as the strategy spreads it over the data-parallel ranks.
        weights: its trainable parameters.
        optimizers: each with its peak learning rates; each weight's piece is in one of them.
        every: it is trained in every so many steps.
    """

    spread: Spread
    weights: Sequence[Weight]
    optimizers: Sequence[torch.optim.Optimizer]
    every: int = 1


class TorchEngine(Engine):
    """Trains a recipe's parts one after the other, each with optimizers of its own.

    Gradients of a step are the mean over the step's samples, whichever rank computed them: each microbatch's mean loss
    is scaled by its weight (and by the number of data-parallel ranks, since strategies average over them).

    Args:
        world: number of ranks.
        data_ranks: number of data-parallel ranks; the others compute the same samples together with one of these.
        counts: whether this rank's share of a loss counts: one rank's of each group that computes the same samples.
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: Mapping[str, Trained],
        *,
        world: int,
        data_ranks: int,
        counts: bool,
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
        self._world, self._data_ranks, self._counts = world, data_ranks, counts
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
            for weight in part.weights:
                weight.clear()
            with self._others_frozen(name):
                losses[name] = self._accumulate(name, microbatches)
            self._mark("optimizer")
            for weight in part.weights:
                weight.collect()
            if self._clip_norm is not None:
                norms[name] = clip_grad_norm(part.weights, self._clip_norm)
            for optimizer in part.optimizers:
                optimizer.step()
        if self._ema is not None:
            self._ema.update(step)
        return StepResult(losses, norms)

    @contextlib.contextmanager
    def _others_frozen(self, name: str) -> Generator[None]:
        """No gradient is computed for the weights of the parts that only help to train ``name``."""
        others = [weight.whole for other, part in self._parts.items() if other != name for weight in part.weights]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _accumulate(self, name: str, microbatches: Sequence[Batch]) -> Tensor:
        """Forward and backward over all microbatches; this rank's share of the step's mean loss."""
        spread = self._parts[name].spread
        modules = self._helping() | {name: spread.trained}
        total: Tensor | None = None
        for batch in microbatches:
            last = batch is microbatches[-1]
            self._reseed(batch.step, batch.index, self.parts.index(name))
            with spread.reducing(last):
                self._mark("forward")
                with self._precision():
                    loss = self._recipe.loss(name, modules, batch)
                self._mark("backward")
                scale = batch.weight * self._data_ranks
                loss.backward(None if scale == 1 else torch.full_like(loss, scale))
            for part in self._parts.values():
                part.spread.rest()
            share = loss.detach().float() * (batch.weight if self._counts else 0.0)
            total = share if total is None else total + share
        assert total is not None, "a rank without microbatches"
        return total

    def _helping(self) -> dict[str, nn.Module]:
        return {name: part.spread.helping for name, part in self._parts.items()}

    def share_buffers(self) -> None:
        if self._world > 1:
            for part in self._parts.values():
                for buffer in part.spread.module.buffers():
                    dist.broadcast(buffer, 0)

    @contextlib.contextmanager
    def evaluating(self) -> Generator[None]:
        self.share_buffers()
        spreads = [part.spread for part in self._parts.values()]
        for spread in spreads:
            spread.module.eval()
        try:
            with self._ema.in_place() if self._ema is not None else contextlib.nullcontext():
                yield
                for spread in spreads:
                    spread.rest()
        finally:
            for spread in spreads:
                spread.module.train()

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad(), self._precision():  # not inference_mode: weights gathered in it could not be trained
            return self._recipe.metrics(self._helping(), batch)

    def samples(self) -> Mapping[str, Tensor]:
        if not isinstance(self._recipe, DrawsSamples):
            return {}
        with torch.no_grad(), self._precision():
            return self._recipe.samples(self._helping())

    def state(self) -> ShardedState:
        return dict(self._shards())

    def load(self, fill: Fill) -> None:
        for part in self._parts.values():
            for optimizer in part.optimizers:
                _materialize(optimizer)
        fill(self.state())

    def _shards(self) -> Iterator[tuple[str, Shard]]:
        for name, part in self._parts.items():
            module = part.spread.module
            for fqn, tensor in module.state_dict(keep_vars=True).items():
                yield f"model.{name}.{fqn}", shard_of(tensor.detach())
            states = {piece: state for optimizer in part.optimizers for piece, state in optimizer.state.items()}
            weights = {weight.whole: weight for weight in part.weights}
            for fqn, parameter in module.named_parameters():
                if (weight := weights.get(parameter)) is not None:
                    for slot, value in sorted(states.get(weight.piece, {}).items()):
                        if isinstance(value, Tensor):
                            yield f"optimizer.{name}.{fqn}.{slot}", weight.like(value)
        if self._ema is not None:
            for fqn, average in self._ema.tensors():
                yield f"ema.{fqn}", shard_of(average)


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
