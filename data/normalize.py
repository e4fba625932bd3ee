"""Zero mean, unit variance, for all elements or each feature: fitted on the training part, the same bits everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

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
        mean: of all elements of 'x' over the training part; of a table ``[samples, features]`` one per feature.
        std: standard deviation (population), 1 where all elements are equal; like ``mean``.
    """

    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0

    @classmethod
    def fit(cls, source: Source, indices: Indices) -> Normalizer:
        """Mean and standard deviation over the samples at ``indices``, which are all read once.

        Partial sums in float64 over chunks of fixed size, merged in order (Chan, Golub & LeVeque 1979), in one thread:
        the bits depend on the data alone. Without a floating-point 'x' the result changes nothing.

        Raises:
            JobError: 'x' holds NaN or infinity.
        """
        pivot: np.ndarray | np.float64 | None = None  # the first row: differences from it are exact where all are equal
        count, mean, squares = 0, np.float64(0.0), np.float64(0.0)
        for start in range(0, len(indices), _CHUNK):
            places = np.arange(start, min(start + _CHUNK, len(indices)), dtype=np.int64)
            x = source.fetch(look_up(indices, places)).get("x")
            if x is None or not x.is_floating_point():
                return cls()
            values = x.double().numpy()
            values = values if values.ndim == 2 else values.ravel()  # rows of features, or of one
            if not np.isfinite(values).all():
                raise JobError(
                    Problem("'x' holds NaN or infinity", "data.normalize", "clean the data, or set it to false")
                )
            if not values.size:
                continue
            pivot = values[0] if pivot is None else pivot
            values = values - pivot
            chunk_mean = values.sum(axis=0) / len(values)
            chunk_squares = np.square(values - chunk_mean).sum(axis=0)
            total, shift = count + len(values), chunk_mean - mean
            mean = mean + shift * len(values) / total
            squares = squares + (chunk_squares + shift * shift * count * len(values) / total)
            count = total
        if pivot is None:
            return cls()
        std = np.sqrt(squares / count)
        return cls(_plain(pivot + mean), _plain(np.where(std > 0, std, 1.0)))

    def apply(self, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``fields`` with 'x' normalised, in its own dtype; the given tensors are not changed.

        Raises:
            JobError: 'x' is no table of as many features as were fitted.
        """
        x = fields.get("x")
        if x is None or not x.is_floating_point():
            return dict(fields)
        if not isinstance(self.mean, tuple):
            return {**fields, "x": (x - self.mean).div_(cast(float, self.std))}
        if x.dim() != 2 or x.shape[1] != len(self.mean):
            found = f"'x' of shape {list(x.shape)} is no table of the {len(self.mean)} features that were normalised"
            raise JobError(Problem(found, "data.source", "go on with the data that the run began with"))
        exact = torch.promote_types(x.dtype, torch.float32)
        mean, std = torch.tensor(self.mean, dtype=exact), torch.tensor(self.std, dtype=exact)
        return {**fields, "x": ((x - mean) / std).to(x.dtype)}

    def state(self) -> dict[str, float | list[float]]:
        """The figures as JSON has them: numbers, or lists of one per feature."""
        return {"mean": _listed(self.mean), "std": _listed(self.std)}

    @classmethod
    def from_state(cls, state: Mapping[str, float | Sequence[float]]) -> Normalizer:
        return cls(mean=_frozen(state["mean"]), std=_frozen(state["std"]))


def _plain(values: np.ndarray | np.float64) -> float | tuple[float, ...]:
    return tuple(map(float, values)) if isinstance(values, np.ndarray) and values.ndim else float(values)


def _listed(value: float | tuple[float, ...]) -> float | list[float]:
    return list(value) if isinstance(value, tuple) else value


def _frozen(value: float | Sequence[float]) -> float | tuple[float, ...]:
    return float(value) if isinstance(value, (int, float)) else tuple(value)
