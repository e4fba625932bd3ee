"""The engine of a pipeline: each rank holds one or several stages of the one part that is trained."""

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
from .finite import all_finite, not_finite
from .passes import Passes, sum_up
from .pipeline import Piped, Schedule
from .relay import generator_states, set_generators
from .scaling import LossScale
from .shards import Among, Weight, clip_grad_norm, shard_of
from .torch_engine import materialize, part_shards


@dataclass(frozen=True)
class Held:
    """What a rank holds of the part, ready to be trained.

    Attributes:
        name: the part's.
        module: the part, with the rank's stages left in it.
        weights: its trainable parameters, by the first of their names.
        optimizers: each with its peak learning rates; each weight's piece is in one of them.
        every: it is trained in every so many steps.
        holders: for each name in ``weights`` the ranks of the pipeline that hold the weight.
    """

    name: str
    module: nn.Module
    weights: Mapping[str, Weight]
    optimizers: Sequence[torch.optim.Optimizer]
    every: int
    holders: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Peers:
    """The groups that a rank is in: of the other stages, and of the same stage's copies and tensor group."""

    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    tensor: dist.ProcessGroup


class PipelineEngine(Engine):
    """Trains a recipe's one part in stages.

    A weight that belongs to several stages is held by each: gradients are added up, and all make the same update.

    Args:
        zero: a float32 scalar on the device of the optimizer's weights.
        scaled: whether losses are scaled, as float16 needs.
        buffers: of this rank's stages, that stay as they were where a step is skipped.
    """

    def __init__(
        self,
        passes: Passes,
        held: Held,
        stages: Sequence[Piped],
        schedule: Schedule,
        peers: Peers,
        *,
        zero: Tensor,
        clip_norm: float | None,
        ema: Ema | None,
        scaled: bool = False,
        buffers: Buffers,
    ) -> None:
        self.parts = (held.name,)
        self._passes, self._held, self._stages, self._schedule, self._peers = passes, held, stages, schedule, peers
        self._groups = [(group, group["lr"]) for opt in held.optimizers for group in opt.param_groups]
        self._clip_norm, self._zero = clip_norm, zero
        self._ema, self._buffers = ema, buffers
        self._scale = LossScale(held.name) if scaled else None
        self._rank = dist.get_rank(peers.pipeline)
        self._shared = {name: weight for name, weight in sorted(held.weights.items()) if len(held.holders[name]) > 1}
        shared = sorted(name for name, ranks in held.holders.items() if len(ranks) > 1)  # on any rank
        self._tags = {name: tag for tag, name in enumerate(shared)}
        self._counted = [weight for name, weight in held.weights.items() if held.holders[name][0] == self._rank]

    def step(self, microbatches: Sequence[Batch], rate: float) -> StepResult:
        step, held = microbatches[0].step, self._held
        for group, peak in self._groups:
            group["lr"] = peak * rate
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        scaling: dict[str, Scaling] = {}
        nonfinite: dict[str, dict[int, float]] = {}
        if step % held.every == 0:
            for weight in held.weights.values():
                weight.clear()
            kept = self._buffers.keep()
            losses[held.name] = self._through(microbatches)
            self._passes.mark("optimizer")
            for weight in held.weights.values():
                weight.collect()
            self._add_up_shared()
            if self._scale is not None:
                pieces = [weight.piece for weight in held.weights.values()]
                scaling[held.name] = self._scale.unscale(pieces, world=dist.get_world_size(), device=self._zero.device)
            overflowed = any(found.overflowed for found in scaling.values())
            if not overflowed and self._clip(norms):
                for optimizer in held.optimizers:
                    optimizer.step()
            else:
                self._buffers.put_back(kept)
                if not overflowed:
                    nonfinite[held.name] = not_finite(self._stages[-1].losses)
        result = StepResult(losses, norms, scaling, nonfinite)
        if self._ema is not None:
            self._ema.update(step, skipped=result.unchanged())
        return result

    def _clip(self, norms: dict[str, Tensor]) -> bool:
        """Clip the gradients where that is asked for, and note their norm; whether they are finite, on all ranks."""
        weights = list(self._held.weights.values())
        if self._clip_norm is None:
            scaled = self._scale is not None  # then that is known
            return scaled or all_finite(weights, apart=True, device=self._zero.device)
        among = Among(self._peers.pipeline, self._counted, self._zero)
        norm = clip_grad_norm(weights, self._clip_norm, among=among)
        if finite := bool(norm.isfinite()):
            norms[self._held.name] = norm
        return finite

    def _through(self, microbatches: Sequence[Batch]) -> Tensor:
        """Forward and backward of all microbatches; this rank's share of the step's mean loss: the last stage's."""
        factor = 1.0 if self._scale is None else self._scale.factor
        for stage in self._stages:
            stage.begin(microbatches, factor)
        self._schedule.step(target=torch.arange(len(microbatches)), return_outputs=False)
        for stage in self._stages:
            stage.end()
        losses = self._stages[-1].losses
        return sum_up(losses) if losses else self._zero

    def _add_up_shared(self) -> None:
        """Give each weight that several stages hold the sum of their gradients, added up in their order."""
        operations: list[dist.P2POp] = []
        terms: list[dict[int, Tensor]] = []
        group = self._peers.pipeline
        for name, weight in self._shared.items():
            tag = self._tags[name]
            own = torch.zeros_like(weight.piece) if weight.piece.grad is None else weight.piece.grad.contiguous()
            found = {rank: own if rank == self._rank else torch.empty_like(own) for rank in self._held.holders[name]}
            for rank, term in found.items():
                if rank != self._rank:
                    operations.append(dist.P2POp(dist.isend, own, group=group, group_peer=rank, tag=tag))
                    operations.append(dist.P2POp(dist.irecv, term, group=group, group_peer=rank, tag=tag))
            terms.append(found)
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        for weight, found in zip(self._shared.values(), terms, strict=True):
            first, *others = (found[rank] for rank in sorted(found))
            for other in others:
                first = first + other
            weight.piece.grad = first

    def share_buffers(self) -> None:
        for group in (self._peers.data, self._peers.tensor):
            if dist.get_world_size(group) > 1:
                for buffer in self._held.module.buffers():
                    dist.broadcast(buffer, group=group, group_src=0)

    @contextlib.contextmanager
    def evaluating(self) -> Generator[None]:
        self.share_buffers()
        self._held.module.eval()
        try:
            with self._ema.in_place() if self._ema is not None else contextlib.nullcontext():
                yield
                for stage in self._stages:
                    stage.end()
        finally:
            self._held.module.train()

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        states = generator_states(self._stages[0].device)
        with torch.no_grad(), self._passes.precision():
            for stage in self._stages:
                set_generators(states, self._stages[0].device)
                found = stage.evaluate(batch, lambda parts: self._passes.recipe.metrics(parts, batch))
        return found

    def samples(self) -> Mapping[str, Tensor]:
        """Nothing: recipes that draw are not pipelined."""
        return {}

    def state(self) -> ShardedState:
        return dict(self._shards())

    def load(self, fill: Fill) -> None:
        for optimizer in self._held.optimizers:
            materialize(optimizer)
        fill(self.state())

    def _shards(self) -> Iterator[tuple[str, Shard]]:
        held = self._held
        yield from part_shards(held.name, held.module, held.weights, held.optimizers)
        if self._ema is not None:
            for fqn, average in self._ema.tensors():
                yield f"ema.{fqn}", shard_of(average)
        if self._scale is not None:
            yield from self._scale.state()
