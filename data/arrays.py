"""Samples that lie in arrays, in memory or mapped from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .files import wrong

Convert = Callable[[Tensor], Tensor]


class ArraySource:
    """One array per batch key, samples along axis 0, as they are or mapped from a file.

    Args:
        arrays: numpy arrays or tensors, all of one length.
        convert: by key, what makes a fetched tensor (samples along axis 0) the batch's: for samples that are stored
            smaller than they are trained on.
        keys: uint64 ``[n]``, one per sample, from what the sample is; the split follows them. Without them it follows
            the index.
        classes: names of the classes that an integer 'y' counts.

    Raises:
        JobError: no array, no sample, unequal lengths, or a dtype that torch does not have.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray | Tensor],
        *,
        convert: Mapping[str, Convert] | None = None,
        keys: np.ndarray | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.arrays = {key: np.asarray(array, order="C") for key, array in arrays.items()}
        self.classes = tuple(classes)
        self._convert = dict(convert or {})
        self._keys = keys
        lengths = {key: len(array) if array.ndim else None for key, array in self.arrays.items()}
        if not lengths:
            raise wrong("there is no array in it", "give one array per batch key, such as 'x' and 'y'")
        if len(set(lengths.values())) > 1 or None in lengths.values():
            shapes = ", ".join(f"'{key}' {list(array.shape)}" for key, array in self.arrays.items())
            raise wrong(f"arrays differ in length: {shapes}", "axis 0 counts the samples")
        for key, array in self.arrays.items():
            try:
                torch.from_numpy(np.empty(0, dtype=array.dtype))
            except (TypeError, ValueError) as error:
                raise wrong(f"array '{key}' has dtype {array.dtype}, which torch does not have") from error
        self._length = len(next(iter(self.arrays.values())))
        if not self._length:
            raise wrong("it has no samples")

    def __len__(self) -> int:
        return self._length

    def fetch(self, indices: np.ndarray) -> dict[str, Tensor]:
        fields = {key: torch.from_numpy(array.take(indices, axis=0)) for key, array in self.arrays.items()}
        return fields | {key: convert(fields[key]) for key, convert in self._convert.items()}

    def sample_keys(self, indices: np.ndarray) -> np.ndarray:
        """What the split goes by, of the samples at ``indices``: uint64 ``[n]``."""
        return indices.astype(np.uint64) if self._keys is None else self._keys[indices]
