"""What ranks tell each other beside their gradients: small values, over gloo."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def gathered(value: T, world: int) -> list[T]:
    """Every rank's ``value``, in rank order. Collective."""
    if world == 1:
        return [value]
    everyones: list[T | None] = [None] * world
    dist.all_gather_object(everyones, value)
    return everyones  # pyright: ignore[reportReturnType]  # each place is filled


def any_of(*flags: bool, world: int) -> list[bool]:
    """Whether each flag is set on any rank. Collective."""
    if world == 1:
        return list(flags)
    answer = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in answer.tolist()]
