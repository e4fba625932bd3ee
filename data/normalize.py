"""Zero mean, unit variance: fitted on the training part, the same bits on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..core.contracts import Source
from ..core.errors import JobError, Problem
from .split import Indices, look_up

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 4096  # samples per partial sum; fixed, because it decides the rounding


@dataclass(frozen=True)
class Normalizer:
    """Shifts and scales floating-point inputs 'x'; leaves integers and every other field alone.

    Attributes:
        mean: of all elements of 'x' over the training part.
        std: standard deviation (population), 1 where all elements are equal.
    """

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def fit(cls, source: Source, indices: Indices) -> Normalizer:
        """Mean and standard deviation over the samples at ``indices``, which are all read once.

        Partial sums in float64 over chunks of fixed size, merged in order (Chan, Golub & LeVeque 1979), in one thread:
        the bits depend on the data alone. Without a floating-point 'x' the result changes nothing.

        Raises:
            JobError: 'x' holds NaN or infinity.
        """
        pivot: np.float64 | None = None  # the first element; sums of differences from it are exact where all are equal
        count, mean, squares = 0, 0.0, 0.0
        for start in range(0, len(indices), _CHUNK):
            places = np.arange(start, min(start + _CHUNK, len(indices)), dtype=np.int64)
            x = source.fetch(look_up(indices, places)).get("x")
            if x is None or not x.is_floating_point():
                return cls()
            values = x.double().numpy().ravel()
            if not np.isfinite(values).all():
                raise JobError(
                    Problem("'x' holds NaN or infinity", "data.normalize", "clean the data, or set it to false")
                )
            if not values.size:
                continue
            pivot = values[0] if pivot is None else pivot
            values = values - pivot
            chunk_mean = float(values.sum()) / values.size
            chunk_squares = float(np.square(values - chunk_mean).sum())
            total, shift = count + values.size, chunk_mean - mean
            mean += shift * values.size / total
            squares += chunk_squares + shift * shift * count * values.size / total
            count = total
        if pivot is None:
            return cls()
        std = math.sqrt(squares / count)
        return cls(float(pivot) + mean, std if std > 0 else 1.0)

    def apply(self, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``fields`` with 'x' normalised, in its own dtype; the given tensors are not changed."""
        x = fields.get("x")
        if x is None or not x.is_floating_point():
            return dict(fields)
        return {**fields, "x": (x - self.mean).div_(self.std)}

    def state(self) -> dict[str, float]:
        return {"mean": self.mean, "std": self.std}

    @classmethod
    def from_state(cls, state: Mapping[str, float]) -> Normalizer:
        return cls(mean=state["mean"], std=state["std"])
