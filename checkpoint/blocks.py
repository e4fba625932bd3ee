"""A tensor's elements in order, a block at a time, so that any size of tensor goes through little memory. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..core.runs import boxes_of_run
from ..core.storage import Storage
from ..core.tensorfile import ITEMSIZE
from .manifest import Block, Manifest, TensorEntry
from .reader import read_arrays

_BLOCK = 16 << 20  # bytes


def ranges(entry: TensorEntry, limit: int = _BLOCK) -> Iterator[tuple[int, int]]:
    """Ranges of the flattened tensor (row-major) that tile it and cut no piece, so that each piece is read once.

    A range has at most ``limit`` bytes, or one piece, or the pieces that lie side by side in the same rows.
    """
    most = max(1, limit // ITEMSIZE[entry.dtype])
    begin = end = 0
    for first, last in sorted(_span(piece, entry.shape) for piece in entry.blocks() if math.prod(piece.shape)):
        if first >= end and last - begin > most and end > begin:
            yield begin, end
            begin = end
        end = max(end, last)
    if end > begin:
        yield begin, end


def read_range(storage: Storage, manifest: Manifest, fqn: str, begin: int, end: int) -> np.ndarray:
    """Elements ``[begin, end)`` of the flattened tensor, verified, as bit patterns: see :func:`~.reader.read_arrays`.

    Raises:
        CorruptCheckpoint: a file is missing or cut short, or a piece is not the one that was written.
    """
    boxes = boxes_of_run(manifest.tensors[fqn].shape, begin, end)
    parts = [read_arrays(storage, manifest, {fqn: box})[fqn].reshape(-1) for box in boxes]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def blocks(storage: Storage, manifest: Manifest, fqn: str) -> Iterator[np.ndarray]:
    """The flattened tensor in order, block after block, verified, as bit patterns.

    Raises:
        CorruptCheckpoint: as :func:`read_range`.
    """
    for begin, end in ranges(manifest.tensors[fqn]):
        yield read_range(storage, manifest, fqn, begin, end)


def _span(piece: Block, whole: tuple[int, ...]) -> tuple[int, int]:
    """The range of the flattened tensor from the piece's first element to its last."""
    first = last = 0
    for offset, extent, size in zip(piece.offset, piece.shape, whole, strict=True):
        first, last = first * size + offset, last * size + offset + extent - 1
    return first, last + 1
