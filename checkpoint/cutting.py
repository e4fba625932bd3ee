"""Cutting a box of a tensor into blocks that can be read and verified alone. Plain arithmetic on indices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from ..core.runs import Box


def cut(offset: tuple[int, ...], shape: tuple[int, ...], itemsize: int, limit: int) -> Iterator[Box]:
    """Boxes of at most ``limit`` bytes (or one element) that follow each other in the row-major box given."""
    axis = _axis(shape)
    if axis is None or prod(shape) * itemsize <= limit:
        yield offset, shape
        return
    rows, whole = _rows(shape, axis, itemsize, limit)
    before, begin, after = offset[:axis], offset[axis], offset[axis + 1 :]
    for first in range(0, shape[axis], rows):
        box = (*shape[:axis], min(rows, shape[axis] - first), *shape[axis + 1 :])
        if whole:
            yield (*before, begin + first, *after), box
        else:
            yield from cut((*before, begin + first, *after), box, itemsize, limit)


def count(shape: Sequence[int], itemsize: int, limit: int) -> int:
    """How many boxes :func:`cut` gives, without making them."""
    axis = _axis(shape)
    if axis is None or prod(shape) * itemsize <= limit:
        return 1
    rows, whole = _rows(shape, axis, itemsize, limit)
    if whole:
        return -(-shape[axis] // rows)
    return shape[axis] * count(shape[axis + 1 :], itemsize, limit)


def _axis(shape: Sequence[int]) -> int | None:
    """The first axis that can be cut."""
    return next((axis for axis, extent in enumerate(shape) if extent > 1), None)


def _rows(shape: Sequence[int], axis: int, itemsize: int, limit: int) -> tuple[int, bool]:
    """How many rows along ``axis`` lie in one box, and whether one row is within the limit."""
    row = prod(shape[axis + 1 :]) * itemsize
    return max(1, limit // row), row <= limit
