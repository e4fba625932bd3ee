"""The engine over plain torch: one process, or copies or shards of the model on several."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.contracts import Batch, Engine, Fill, Scaling, Shard, ShardedState, StepResult
from .buffers import Buffers
from .ema import Ema
from .finite import all_finite, beginning, not_finite
from .passes import Passes, others_frozen, sum_up
from .reduce import Statistics
from .scaling import LossScale
from .shards import Weight, clip_grad_norm, shard_of
from .spread import Spread


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

    Args:
        world: number of ranks.
        scaled: whether losses are scaled, as float16 needs.
        statistics: of the parts' buffers, where they are combined over microbatches; else each rank has its own.
        buffers: of all parts, that stay as they were where a step is skipped.
    """

    def __init__(
        self,
        passes: Passes,
        parts: Mapping[str, Trained],
        *,
        world: int,
        clip_norm: float | None,
        ema: Ema | None,
        scaled: bool = False,
        statistics: Statistics | None = None,
        buffers: Buffers,
    ) -> None:
        self.parts = tuple(parts)
        self._passes = passes
        self._parts = dict(parts)
        self._groups = [
            (group, group["lr"]) for part in parts.values() for opt in part.optimizers for group in opt.param_groups
        ]
        self._world = world
        self._clip_norm = clip_norm
        self._ema = ema
        self._scales = {name: LossScale(name) for name in parts} if scaled else {}
        self._apart = {name: any(weight.groups() for weight in part.weights) for name, part in parts.items()}
        self._statistics = statistics
        self._buffers = buffers

    def step(self, microbatches: Sequence[Batch], rate: float) -> StepResult:
        step = microbatches[0].step
        for group, peak in self._groups:
            group["lr"] = peak * rate
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        scaling: dict[str, Scaling] = {}
        nonfinite: dict[str, dict[int, float]] = {}
        for name, part in self._parts.items():
            if step % part.every:
                continue
            for weight in part.weights:
                weight.clear()
            kept = self._buffers.keep()
            with others_frozen(self._modules(), name):
                shares = self._accumulate(name, microbatches)
            losses[name] = sum_up(shares)
            self._passes.mark("optimizer")
            for weight in part.weights:
                weight.collect()
            if (scale := self._scales.get(name)) is not None:
                pieces = [weight.piece for weight in part.weights]
                scaling[name] = scale.unscale(pieces, world=self._world, device=pieces[0].device)
                if scaling[name].overflowed:
                    self._buffers.put_back(kept)
                    continue
            if not self._clip(name, norms):
                nonfinite[name] = not_finite(shares)
                self._buffers.put_back(kept)
                continue
            for optimizer in part.optimizers:
                optimizer.step()
        result = StepResult(losses, norms, scaling, nonfinite)
        if self._ema is not None:
            self._ema.update(step, skipped=result.unchanged())
        return result

    def _clip(self, name: str, norms: dict[str, Tensor]) -> bool:
        """Clip the gradients where that is asked for, and note their norm; whether they are finite, on all ranks."""
        weights = self._parts[name].weights
        if self._clip_norm is None:
            scaled = name in self._scales  # then that is known
            return scaled or all_finite(weights, apart=self._apart[name], device=weights[0].piece.device)
        norm = clip_grad_norm(weights, self._clip_norm)
        if finite := bool(norm.isfinite()):
            norms[name] = norm
        return finite

    def _accumulate(self, name: str, microbatches: Sequence[Batch]) -> dict[int, Tensor]:
        """Forward and backward over all microbatches; of each, by its index, its share of the step's mean loss."""
        spread = self._parts[name].spread
        modules = self._helping() | {name: spread.trained}
        factor = self._scales[name].factor if name in self._scales else 1.0

        def backward(loss: Tensor, weight: float) -> None:
            loss = loss.float()  # a float16 may not hold the factor
            loss.backward(beginning(loss, weight * factor))

        shares: dict[int, Tensor] = {}
        for batch in microbatches:
            statistics = contextlib.nullcontext() if self._statistics is None else self._statistics.of_microbatch()
            with spread.reducing(batch is microbatches[-1]), statistics:
                shares[batch.index] = self._passes.run(name, self.parts.index(name), modules, batch, backward)
            for part in self._parts.values():
                part.spread.rest()
        if self._statistics is not None:
            self._statistics.settle()
        return shares

    def _modules(self) -> dict[str, nn.Module]:
        return {name: part.spread.module for name, part in self._parts.items()}

    def _helping(self) -> dict[str, nn.Module]:
        return {name: part.spread.helping for name, part in self._parts.items()}

    def share_buffers(self) -> None:
        if self._world > 1:
            for module in self._modules().values():
                for buffer in module.buffers():
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
        with torch.no_grad(), self._passes.precision():  # weights gathered in inference mode could not be trained
            return self._passes.recipe.metrics(self._helping(), batch)

    def samples(self) -> Mapping[str, Tensor]:
        return self._passes.samples(self._helping())

    def state(self) -> ShardedState:
        return dict(self._shards())

    def load(self, fill: Fill) -> None:
        for part in self._parts.values():
            for optimizer in part.optimizers:
                materialize(optimizer)
        fill(self.state())

    def _shards(self) -> Iterator[tuple[str, Shard]]:
        for name, part in self._parts.items():
            module = part.spread.module
            by_parameter = {weight.whole: weight for weight in part.weights}
            weights = {n: by_parameter[p] for n, p in module.named_parameters() if p in by_parameter}
            yield from part_shards(name, module, weights, part.optimizers)
        if self._ema is not None:
            for fqn, average in self._ema.tensors():
                yield f"ema.{fqn}", shard_of(average)
        for scale in self._scales.values():
            yield from scale.state()


def part_shards(
    name: str, module: nn.Module, weights: Mapping[str, Weight], optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, Shard]]:
    """What this rank holds of part ``name``: its tensors, and the optimizers' state of ``weights``, named as given."""
    for fqn, tensor in module.state_dict(keep_vars=True).items():
        yield f"model.{name}.{fqn}", shard_of(tensor.detach())
    states = {piece: state for optimizer in optimizers for piece, state in optimizer.state.items()}
    for fqn, weight in weights.items():
        for slot, value in sorted(states.get(weight.piece, {}).items()):
            if isinstance(value, Tensor):
                yield f"optimizer.{name}.{fqn}.{slot}", weight.like(value)


def materialize(optimizer: torch.optim.Optimizer) -> None:
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
