"""Training, validation and test parts: dealt by a keyed hash of the sample's index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..core.contracts import Source
from ..core.errors import JobError, Problem
from ..core.job import Split
from .order import hash64

if TYPE_CHECKING:
    from torch import Tensor

#: Indices of samples: a range where all are meant, so that a data set of any size costs no memory.
Indices = np.ndarray | range

_KEY = 0x73706C6974  # fixed: a job's seed changes neither its validation nor its test set
_CHUNK = 1 << 20


def split(n: int, spec: Split) -> dict[str, Indices]:
    """The indices (int64, ascending) of the 'train', 'val' and 'test' parts of ``n`` samples.

    A sample's part depends on its index alone, so samples appended to a data set move none of the older ones. Sizes
    follow the shares up to chance. Time and memory are O(n), and O(1) where the training share is 1.

    Raises:
        JobError: the training part is empty.
    """
    shares = {"train": spec.train, "val": spec.val, "test": spec.test}
    if spec.train == 1.0:
        parts: dict[str, Indices] = {"train": range(n), "val": range(0), "test": range(0)}
    else:
        names = [name for name, share in shares.items() if share > 0]
        # The last part takes all the rest: shares that sum to 1 only up to rounding lose no sample.
        edges = np.cumsum([shares[name] for name in names])[:-1] * 2.0**64
        found: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype=np.int64)] for name in shares}
        for start in range(0, n, _CHUNK):
            chunk = np.arange(start, min(start + _CHUNK, n), dtype=np.int64)
            part = np.searchsorted(edges, hash64(_KEY, chunk).astype(np.float64), side="right")
            for i, name in enumerate(names):
                found[name].append(chunk[part == i])
        parts = {name: np.concatenate(pieces) for name, pieces in found.items()}
    if not len(parts["train"]):
        raise JobError(Problem(f"the training part of {n} samples is empty", "data.split.train", "raise its share"))
    return parts


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
