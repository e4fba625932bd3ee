"""A part's weights, buffers and optimizer state under DeepSpeed's ZeRO, by our names, where they lie.

ZeRO cuts flat buffers of several tensors into equal ranges, one a rank; what a rank holds of a tensor is a run of its
elements. Nothing is gathered to save, and to load a rank copies its runs. Where the buffers are is not DeepSpeed's
documented interface, which is why its version is bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.contracts import Run, Shard


@dataclass(frozen=True)
class _Place:
    """Where this rank's run of a parameter lies in the flat buffer that its optimizer updates."""

    flat: Tensor
    begin: int
    start: int
    """Of the run, in the flattened parameter."""
    count: int


class ZeroState:
    """State of one part, whose DeepSpeed engine trains in float32 with SGD, Adam or AdamW."""

    def __init__(self, engine: Any, *, stage: int) -> None:
        self._module: nn.Module = engine.module
        self._zero = engine.optimizer
        self._stage = stage
        self._places = dict(self._shared_places() if stage < 3 else self._dealt_places())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that updates the flat buffers."""
        return self._zero.optimizer

    def weights(self) -> Iterator[tuple[str, Shard | Run]]:
        """Parameters and persistent buffers by fully qualified name."""
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            yield name, self._piece(tensor)

    def trainable(self) -> Iterator[tuple[str, Shard | Run]]:
        """The trainable parameters by fully qualified name, tied ones once."""
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                yield name, self._piece(parameter)

    def slots(self) -> Iterator[tuple[str, Shard | Run]]:
        """The optimizer's state by ``<fqn>.<slot>``; nothing before the first step or :meth:`make_slots`."""
        for name, parameter in self._module.named_parameters():
            place = self._places.get(parameter)
            if place is None:
                continue
            shape = self._shape(parameter)
            for slot, value in sorted(self.optimizer.state.get(place.flat, {}).items()):
                if isinstance(value, Tensor) and value.dim():
                    run = value.detach()[place.begin : place.begin + place.count]
                    yield f"{name}.{slot}", Run(shape, place.start, run)
                elif isinstance(value, Tensor):
                    yield f"{name}.{slot}", Shard((), (), value)

    def scale_losses(self, factor: float) -> None:
        """Have the next step multiply losses and divide gradients by ``factor``, and be skipped where they overflow.

        In the place of DeepSpeed's scaling under autocast, by which each rank decides alone, for each of its buffers.
        """
        self._zero.torch_autocast_gradscaler = None
        self._zero.override_loss_scale(factor)

    @property
    def overflowed(self) -> bool:
        """Whether gradients of the last step were not finite, on any rank, so that it changed nothing."""
        return bool(self._zero.overflow)

    def make_slots(self) -> None:
        """Create the optimizer's state as its first step would."""
        for flat in {id(place.flat): place.flat for place in self._places.values()}.values():
            state = self.optimizer.state[flat]
            for slot in _slots(self.optimizer):
                if slot not in state:
                    state[slot] = torch.tensor(0.0) if slot == "step" else torch.zeros_like(flat)

    def release(self) -> None:
        """Before this rank's pieces change: let go of weights gathered from them."""
        if self._stage == 3:
            parameters: list[Any] = list(self._module.parameters())
            parameters[0].partition(parameters)

    def publish(self) -> None:
        """After this rank's pieces changed: have the forward pass find them. Collective."""
        kept = self._zero.persistent_parameters if self._stage == 3 else ()
        if kept:  # small weights, which every rank keeps whole between steps
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def load_optimizers_copy(self) -> None:
        """After weights were loaded: have the optimizer start from them too."""
        self._zero.refresh_fp32_params()

    def _piece(self, tensor: Any) -> Shard | Run:
        if hasattr(tensor, "ds_tensor"):
            start, count = _range(tensor)
            return Run(self._shape(tensor), start, tensor.ds_tensor.detach()[:count])
        return Shard(tuple(tensor.shape), (0,) * tensor.dim(), tensor.detach())

    def _shape(self, tensor: Any) -> tuple[int, ...]:
        return tuple(tensor.ds_shape if hasattr(tensor, "ds_shape") else tensor.shape)

    def _shared_places(self) -> Iterator[tuple[nn.Parameter, _Place]]:
        """Stages 1 and 2: each group of the optimizer is one flat buffer, cut anywhere."""
        for group, flat in zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is None:
                    yield parameter, _Place(flat, 0, 0, 0)
                else:
                    mine, its = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield parameter, _Place(flat, mine.start, its.start, mine.numel)

    def _dealt_places(self) -> Iterator[tuple[nn.Parameter, _Place]]:
        """Stage 3: every parameter is cut into equal ranges, and a rank's ranges follow each other."""
        for group, flat in zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True):
            begin = 0
            for parameter in group:
                start, count = _range(parameter)
                yield parameter, _Place(flat, begin, start, count)
                begin += parameter.partition_numel()


def _range(parameter: Any) -> tuple[int, int]:
    """Start and length of this rank's range of a parameter under stage 3; the last ones are padded, or empty."""
    size, rank = parameter.partition_numel(), dist.get_rank(parameter.ds_process_group)
    start = min(rank * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def _slots(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
    return "step", "exp_avg", "exp_avg_sq"
