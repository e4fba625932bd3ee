"""The strategy 'fsdp': weights, gradients and optimizer state cut over the ranks (torch FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from .dealing import Dealer
from .spread import Spread


class Fsdp(Spread):
    """Shards of a module on a mesh of data-parallel ranks: one axis, or (replicas, shards).

    Gradients are averaged over all axes of the mesh. Weights are gathered as ``half``, which is what autocast would
    make of them, and reduced in float32; shards, and what the optimizer keeps, are float32.

    Args:
        units: names of the submodules that are gathered as one; what is in none of them is gathered with the root.
        reshard: whether gathered weights are freed after forward.
        every_microbatch: whether gradients are reduced in every microbatch's backward.
        offload: whether shards lie in host memory.
        half: the 16-bit type to gather in; None gathers what the shards are.
        dealer: who gives weights that are dealt back whole, for one unit after the other to be sharded.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        *,
        units: Sequence[str],
        reshard: bool = True,
        every_microbatch: bool = False,
        offload: bool = False,
        half: torch.dtype | None = None,
        dealer: Dealer | None = None,
    ) -> None:
        precision = MixedPrecisionPolicy(
            param_dtype=half,
            reduce_dtype=None if half is None else torch.float32,
            cast_forward_inputs=False,
        )
        parked: OffloadPolicy = CPUOffloadPolicy() if offload else OffloadPolicy()
        for part in (*(module.get_submodule(name) for name in _innermost_first(units)), module):
            if dealer is not None:
                dealer.make_whole(part.parameters())
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard, mp_policy=precision, offload_policy=parked)
        assert isinstance(module, FSDPModule)
        self.module = self.trained = self.helping = self._root = module
        self._every_microbatch = every_microbatch

    def reducing(self, last: bool) -> contextlib.AbstractContextManager[object]:
        self._root.set_requires_gradient_sync(last or self._every_microbatch)
        self._root.set_requires_all_reduce(last)
        return contextlib.nullcontext()

    def rest(self) -> None:
        for part in self._root.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def _innermost_first(units: Sequence[str]) -> list[str]:
    """A unit within a unit is sharded on its own; the outer one takes what is left."""
    return sorted((name for name in units if name), key=lambda name: -name.count("."))
