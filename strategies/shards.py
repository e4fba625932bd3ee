"""Weights of which this rank holds a piece (DTensor) beside whole ones, alike for optimizers and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core.contracts import Shard


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor: Tensor) -> Shard:
    """This rank's piece, and where it lies; it may be empty."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Shard(shape, (0,) * tensor.dim(), tensor)
    (chunk,) = tensor.__create_chunk_list__()
    return Shard(shape, tuple(chunk.offsets), tensor.to_local())


class Weight:
    """A trainable parameter, and the piece of it that this rank's optimizer updates.

    Update rules that treat every element alike need no DTensor, whose operations cost many times more to dispatch.

    Attributes:
        whole: the module's parameter, which gradients flow to.
        piece: the same memory as a plain parameter; ``whole`` itself where it is not cut.
    """

    def __init__(self, whole: nn.Parameter) -> None:
        self.whole = whole
        self.piece = nn.Parameter(local(whole.detach())) if isinstance(whole, DTensor) else whole

    def collect(self) -> None:
        """Give the piece its piece of the gradient."""
        grad = self.whole.grad
        if isinstance(grad, DTensor) and isinstance(self.whole, DTensor):
            if grad.placements != self.whole.placements:  # such as a sum that is still to be made
                grad = grad.redistribute(placements=self.whole.placements)
            self.piece.grad = grad.to_local()

    def clear(self) -> None:
        self.whole.grad = self.piece.grad = None

    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """The groups of ranks that it is cut over."""
        if not isinstance(self.whole, DTensor):
            return ()
        mesh, placements = self.whole.device_mesh, self.whole.placements
        return tuple(mesh.get_group(axis) for axis, placement in enumerate(placements) if not placement.is_replicate())

    def like(self, state: Tensor) -> Shard:
        """Where an optimizer's ``state`` of the piece lies: as the weight does, or a figure for all of it."""
        if state.shape != self.piece.shape:
            return Shard(tuple(state.shape), (0,) * state.dim(), state)
        place = shard_of(self.whole.detach())
        return Shard(place.shape, place.offset, state)


@dataclass(frozen=True)
class Among:
    """Ranks that hold different weights of one model.

    Attributes:
        group: these ranks.
        counted: those of a rank's weights that no other counts.
        zero: a float32 scalar on the device of the weights; a rank may have none.
    """

    group: dist.ProcessGroup
    counted: Sequence[Weight]
    zero: Tensor


def clip_grad_norm(weights: Iterable[Weight], max_norm: float, *, among: Among | None = None) -> Tensor:
    """Scale all collected gradients so that the whole model's L2 norm stays below ``max_norm``; the norm before.

    As torch's ``clip_grad_norm_``, for any mixture of whole weights and weights that are cut over different ranks, or
    that are ``among`` those of other ranks. Collective where there are such.
    """
    weights = list(weights)
    alike: dict[tuple[dist.ProcessGroup, ...], list[nn.Parameter]] = {}
    for weight in weights if among is None else among.counted:
        alike.setdefault(weight.groups(), []).append(weight.piece)
    norms = [_norm(pieces, groups) for groups, pieces in alike.items()]
    if among is not None:
        square = sum((norm.square() for norm in norms), among.zero.clone())
        dist.all_reduce(square, group=among.group)
        total = square.sqrt()
    else:
        total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    nn.utils.clip_grads_with_norm_([weight.piece for weight in weights], max_norm, total)
    return total


def _norm(pieces: Sequence[nn.Parameter], groups: Sequence[dist.ProcessGroup]) -> Tensor:
    norm = nn.utils.get_total_norm([piece.grad for piece in pieces if piece.grad is not None])
    if not groups:
        return norm
    square = norm.square()
    for group in groups:
        dist.all_reduce(square, group=group)
    return square.sqrt()
