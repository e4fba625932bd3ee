"""The engine over DeepSpeed's ZeRO: optimizer state, gradients, weights dealt to the data-parallel ranks."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.contracts import Batch, Engine, Fill, Run, Scaling, Shard, ShardedState, StepResult
from ..core.job import Job
from ..core.zero import settings
from .buffers import Buffers
from .dealing import Dealer
from .deepspeed_state import ZeroState
from .ema import Ema
from .finite import beginning, not_finite
from .optimizers import build_optimizers
from .passes import Passes, others_frozen, sum_up
from .scaling import LossScale


@dataclass(frozen=True)
class _Part:
    """A part of the recipe with a DeepSpeed engine of its own."""

    engine: Any
    state: ZeroState
    every: int
    peaks: tuple[float, ...]
    scale: LossScale | None

    @property
    def module(self) -> nn.Module:
        """The recipe's own module."""
        return self.engine.module

    def set_rate(self, rate: float) -> None:
        """Let every group of the optimizer have its peak learning rate times ``rate``."""
        for group, peak in zip(self.state.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate


class ZeroEngine(Engine):
    """Trains a recipe's parts one after the other, each with a DeepSpeed engine and one optimizer.

    Under ZeRO's stage 3 a forward pass gathers weights, so every rank must make the same number of them, in evaluation
    too.
    """

    def __init__(
        self,
        passes: Passes,
        modules: Mapping[str, nn.Module],
        job: Job,
        *,
        world: int,
        device: torch.device,
        dealer: Dealer | None,
    ) -> None:
        """Deal ``modules``, which hold the same weights on every rank, to the ``world`` ranks. Collective.

        ``dealer`` has dealt their weights already, if there is one, and gives them back as DeepSpeed asks for them.
        """
        deepspeed = _deepspeed(device)
        if not dist.is_initialized():  # a world of one rank has no group yet, and DeepSpeed needs one
            backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # public by its documentation
            dist.init_process_group(backends, rank=0, world_size=1, store=store)
        self.parts = tuple(modules)
        self._passes = passes
        self._clips = job.train.clip_norm is not None
        self._buffers = Buffers.at_stake(job, modules.values())
        self._parts: dict[str, _Part] = {}
        for name, module in modules.items():
            spec = job.train.optimizer_of(name)
            (optimizer,) = build_optimizers(module, spec)
            peaks = tuple(group["lr"] for group in optimizer.param_groups)
            config = settings(job, world)
            if dealer is not None:
                with dealer:
                    deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=torch.float32)
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
            state = ZeroState(engine, stage=job.parallel.zero_stage)
            scale = LossScale(name) if job.train.precision == "fp16" else None
            self._parts[name] = _Part(engine, state, spec.every, peaks, scale)
        self._ema = (
            Ema({name: piece.data for name, piece in self._trainable()}, job.train.ema) if job.train.ema else None
        )

    def step(self, microbatches: Sequence[Batch], rate: float) -> StepResult:
        step = microbatches[0].step
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        scaling: dict[str, Scaling] = {}
        nonfinite: dict[str, dict[int, float]] = {}
        for name, part in self._parts.items():
            if step % part.every:
                continue
            part.set_rate(rate)
            if part.scale is not None:
                part.state.scale_losses(part.scale.factor)
            kept = self._buffers.keep()
            with others_frozen(self._modules(), name):
                shares = self._accumulate(name, microbatches)
            losses[name] = sum_up(shares)
            self._passes.mark("optimizer")
            part.engine.step()  # which changes nothing where the norm of all ranks' gradients is not finite
            if part.scale is not None:
                scaling[name] = part.scale.settle(part.state.overflowed)
            elif part.state.overflowed:
                nonfinite[name] = not_finite(shares)
            if part.state.overflowed:
                self._buffers.put_back(kept)
            elif self._clips:
                norms[name] = torch.as_tensor(part.engine.get_global_grad_norm(), dtype=torch.float32)
        result = StepResult(losses, norms, scaling, nonfinite)
        if self._ema is not None:
            self._ema.update(step, skipped=result.unchanged())
        return result

    def _accumulate(self, name: str, microbatches: Sequence[Batch]) -> dict[int, Tensor]:
        """Forward and backward over all microbatches; of each, by its index, its share of the step's mean loss."""
        engine = self._parts[name].engine
        # A helper is called without its engine, which would prepare for a backward pass that never comes.
        modules = self._modules() | {name: engine}

        def backward(loss: Tensor, scale: float) -> None:
            loss = loss.float()
            engine.backward(loss * beginning(loss, scale), scale_wrt_gas=False)

        shares: dict[int, Tensor] = {}
        for batch in microbatches:
            engine.set_gradient_accumulation_boundary(batch is microbatches[-1])
            shares[batch.index] = self._passes.run(name, self.parts.index(name), modules, batch, backward)
        return shares

    def _modules(self) -> dict[str, nn.Module]:
        return {name: part.module for name, part in self._parts.items()}

    def share_buffers(self) -> None:
        for module in self._modules().values():
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    @contextlib.contextmanager
    def evaluating(self) -> Generator[None]:
        self.share_buffers()
        for module in self._modules().values():
            module.eval()
        try:
            with self._averages_in_place():
                yield
        finally:
            for module in self._modules().values():
                module.train()

    @contextlib.contextmanager
    def _averages_in_place(self) -> Generator[None]:
        if self._ema is None:
            yield
            return
        try:
            with self._ema.in_place():
                self._publish()
                yield
        finally:
            self._publish()

    def _publish(self) -> None:
        for part in self._parts.values():
            part.state.publish()

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad(), self._passes.precision():  # weights gathered in inference mode could not be trained
            return self._passes.recipe.metrics(self._modules(), batch)

    def samples(self) -> Mapping[str, Tensor]:
        return self._passes.samples(self._modules())

    def state(self) -> ShardedState:
        return dict(self._pieces())

    def load(self, fill: Fill) -> None:
        for part in self._parts.values():
            part.state.make_slots()
            part.state.release()
        try:
            fill(dict(self._pieces()))
        finally:  # a piece may be damaged on one rank alone: the others wait for it in what is collective
            for part in self._parts.values():
                part.state.load_optimizers_copy()
            self._publish()

    def _pieces(self) -> Iterator[tuple[str, Shard | Run]]:
        for name, part in self._parts.items():
            for fqn, piece in part.state.weights():
                yield f"model.{name}.{fqn}", piece
            for fqn, piece in part.state.slots():
                yield f"optimizer.{name}.{fqn}", piece
            if part.scale is not None:
                yield from part.scale.state()
        if self._ema is not None:
            weights = dict(self._trainable())
            for fqn, average in self._ema.tensors():
                yield f"ema.{fqn}", replace(weights[fqn], data=average)

    def _trainable(self) -> Iterator[tuple[str, Shard | Run]]:
        for name, part in self._parts.items():
            for fqn, piece in part.state.trainable():
                yield f"{name}.{fqn}", piece


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed, imported for this rank's device, and kept from compiling what training never uses."""
    os.environ["DS_ACCELERATOR"] = device.type
    # It calls collectives by names that torch has renamed, and would say so with every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # collectives of its tensor-parallel inference
    return deepspeed
