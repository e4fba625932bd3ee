"""Training, validation and test parts: dealt by a keyed hash of the sample, or of its index."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..core.contracts import DealtSource, KeyedSource, Source
from ..core.errors import JobError, Problem
from ..core.job import Split
from .order import hash64

if TYPE_CHECKING:
    from torch import Tensor

#: Indices of samples: a range where all are meant, so that a data set of any size costs no memory.
Indices = np.ndarray | range

PARTS = ("train", "val", "test")
_KEY = 0x73706C6974  # fixed: a job's seed changes neither its validation nor its test set
_CHUNK = 1 << 20


def split_source(source: Source, spec: Split) -> dict[str, Indices]:
    """The indices (int64, ascending) of the 'train', 'val' and 'test' parts of a source.

    A sample's part depends on the sample alone where the source has keys for them, else on its index: so what is added
    to a data set, or at its end, moves none of the samples that were there.

    Raises:
        JobError: the training part is empty.
    """
    if isinstance(source, DealtSource):
        return dict(source.parts())
    return split(len(source), spec, source.sample_keys if isinstance(source, KeyedSource) else None)


def split(n: int, spec: Split, keys: Callable[[np.ndarray], np.ndarray] | None = None) -> dict[str, Indices]:
    """The indices (int64, ascending) of the 'train', 'val' and 'test' parts of ``n`` samples.

    A sample's part depends on its key alone. Sizes follow the shares up to chance. Time and memory are O(n), and O(1)
    where the training share is 1.

    Args:
        keys: from indices (int64) to the samples' keys (uint64); the default key is the index itself.

    Raises:
        JobError: the training part is empty.
    """
    if spec.train == 1.0:
        parts: dict[str, Indices] = {"train": range(n), "val": range(0), "test": range(0)}
    else:
        found: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype=np.int64)] for name in PARTS}
        for start in range(0, n, _CHUNK):
            chunk = np.arange(start, min(start + _CHUNK, n), dtype=np.int64)
            part = part_of(chunk if keys is None else keys(chunk), spec)
            for i, name in enumerate(PARTS):
                found[name].append(chunk[part == i])
        parts = {name: np.concatenate(pieces) for name, pieces in found.items()}
    if not len(parts["train"]):
        raise JobError(Problem(f"the training part of {n} samples is empty", "data.split.train", "raise its share"))
    return parts


def part_of(keys: np.ndarray, spec: Split) -> np.ndarray:
    """Which of :data:`PARTS` samples with these keys (non-negative integers, ``[n]``) belong to: int64 ``[n]``."""
    shares = np.array([spec.train, spec.val, spec.test])
    (taken,) = np.nonzero(shares)
    # The last part takes all the rest: shares that sum to 1 only up to rounding lose no sample.
    edges = np.cumsum(shares[taken])[:-1] * 2.0**64
    return taken[np.searchsorted(edges, hash64(_KEY, keys).astype(np.float64), side="right")]


class Subset:
    """A source that shows only the samples at ``indices`` of another one."""

    def __init__(self, source: Source, indices: Indices) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return self.source.fetch(look_up(self.indices, indices))


def look_up(indices: Indices, places: np.ndarray) -> np.ndarray:
    """``indices[places]`` for an array or a range; int64."""
    if isinstance(indices, range):
        return places if indices.start == 0 and indices.step == 1 else indices.start + places * indices.step
    return indices[places]
