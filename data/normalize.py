"""Zero mean, unit variance, for all elements or each feature: fitted on the training part, the same bits everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from ..core.contracts import Source
from ..core.errors import JobError, Problem
from .split import Indices, look_up

if TYPE_CHECKING:
    from torch import Tensor

# The samples of a partial sum decide the rounding, so their number depends on nothing but the size of a sample.
_CHUNK = 4096
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Normalizer:
    """Shifts and scales floating-point inputs 'x'; leaves integers and every other field alone.

    Attributes:
        mean: of all elements of 'x' over the training part; of a table ``[samples, features]``, one per feature.
        std: standard deviation (population), 1 where all elements are equal; likewise.
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
        first = source.fetch(look_up(indices, np.zeros(1, dtype=np.int64))).get("x") if len(indices) else None
        if first is None or not first.is_floating_point() or not first.numel():
            return cls()
        by_column = first.ndim == 2
        columns = first.shape[1] if by_column else 1
        chunk = max(1, min(_CHUNK, _CHUNK_BYTES // first.nbytes))
        # The first element of each column: sums of differences from it are exact where all are equal.
        pivot = first.double().numpy().reshape(-1)[:columns, None]
        count, mean, squares = 0, np.zeros(columns), np.zeros(columns)
        for start in range(0, len(indices), chunk):
            places = np.arange(start, min(start + chunk, len(indices)), dtype=np.int64)
            values = source.fetch(look_up(indices, places))["x"].double().numpy()
            values = np.ascontiguousarray(values.reshape(-1, columns).T)  # numpy sums in pairs along the last axis only
            if not np.isfinite(values).all():
                raise JobError(
                    Problem("'x' holds NaN or infinity", "data.normalize", "clean the data, or set it to false")
                )
            size = values.shape[1]
            values -= pivot
            chunk_mean = values.sum(axis=1) / size
            chunk_squares = np.square(values - chunk_mean[:, None]).sum(axis=1)
            total, shift = count + size, chunk_mean - mean
            mean += shift * size / total
            squares += chunk_squares + shift * shift * count * size / total
            count = total
        std = np.sqrt(squares / count)
        std[std == 0] = 1.0
        mean += pivot[:, 0]
        return cls(tuple(mean.tolist()), tuple(std.tolist())) if by_column else cls(float(mean[0]), float(std[0]))

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
        """JSON-able."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in (("mean", self.mean), ("std", self.std))}

    @classmethod
    def from_state(cls, state: Mapping[str, float | list[float]]) -> Normalizer:
        return cls(*(tuple(v) if isinstance(v, list) else v for v in (state["mean"], state["std"])))
