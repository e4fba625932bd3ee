"""Runs of consecutive elements of a tensor in row-major order, as boxes. Plain arithmetic on indices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

#: A box in a tensor: the index of its first element along each axis, and its extents.
Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes_of_run(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The elements ``start`` to ``stop`` of a tensor of ``shape`` as boxes, in order; nothing for an empty run.

    They are the end of a row that the run begins in, whole rows, and the beginning of the last one, and within those
    rows the same again: ``2 * len(shape) - 1`` boxes at most.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    first, begin = divmod(start, row)
    last, end = divmod(stop, row)
    if first == last:
        yield from _within(first, shape, begin, end)
        return
    if begin:
        yield from _within(first, shape, begin, row)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _within(last, shape, 0, end)


def _within(index: int, shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes of a run within row ``index``."""
    for offset, extents in boxes_of_run(shape[1:], start, stop):
        yield (index, *offset), (1, *extents)
