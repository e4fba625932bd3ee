"""Losses and gradients that are not finite: found on all ranks alike, before an optimizer has changed a weight.

A loss that is not finite makes the gradients of its backward pass undefined, and these are reduced over the ranks
anyway: no rank has to be asked. Where every rank has whole gradients, or their norm is reduced to clip them, no
collective is added; where ranks hold pieces, one of a single number is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import Weight


def beginning(loss: Tensor, weight: float) -> Tensor:
    """What to begin the backward pass of ``loss`` (float32 scalar) with: ``weight``, or NaN where it is not finite.

    An infinite loss may have finite gradients, and then only the rank that computed it would know.
    """
    return loss.detach() * 0 + weight


def check(gradients: list[Tensor], *, inverse: float, device: torch.device) -> Tensor:
    """Multiply ``gradients`` by ``inverse``, in place: a float32 scalar on ``device``, 1 if any was not finite."""
    found = torch.zeros((), device=device)
    if gradients:
        kernel = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateImportUsage]  # GradScaler's
        kernel([_numbers(gradient) for gradient in gradients], found, torch.full((), inverse, device=device))
    return found


def _numbers(gradient: Tensor) -> Tensor:
    """The real numbers that a gradient consists of, in its memory."""
    held = gradient._values() if gradient.is_sparse else gradient
    return torch.view_as_real(held) if held.is_complex() else held


def all_finite(weights: Sequence[Weight], *, apart: bool, device: torch.device) -> bool:
    """Whether the collected gradients of ``weights`` are finite.

    Args:
        apart: ranks hold different gradients, so they have to agree: collective over all of them.
        device: of the gradients. On a GPU the host waits here for them.
    """
    gradients = [weight.piece.grad for weight in weights if weight.piece.grad is not None]
    found = check(gradients, inverse=1.0, device=device)
    if apart:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return not found.item()


def not_finite(losses: Mapping[int, Tensor]) -> dict[int, float]:
    """Those of some microbatches' losses, by microbatch, that are not finite."""
    found = {index: loss.item() for index, loss in losses.items()}
    return {index: loss for index, loss in found.items() if not math.isfinite(loss)}
