"""How two checkpoints differ, tensor by tensor, a block of each in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.storage import Storage
from ..core.tensorfile import ITEMSIZE
from .blocks import ranges, read_range
from .manifest import Manifest, TensorEntry

_PLAIN = {"BOOL": "?", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8"}
_PLAIN |= {f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)}


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints, and which of its tensors are looked at."""

    storage: Storage
    manifest: Manifest
    names: Sequence[str]


@dataclass(frozen=True)
class Difference:
    """One tensor that the two do not have alike.

    Attributes:
        name: of the tensor.
        kind: "missing" (only the first has it), "added" (only the second), "shape", "dtype" or "values".
        what: of the two, where it is not the values: what each has.
        elements: how many the tensor has.
        differing: how many of them differ. Two NaN are alike; NaN and a number are not.
        max_abs: the largest absolute difference, of elements that are no NaN on either side.
        max_rel: the largest of that over the larger magnitude of the two.
        nans: how many are NaN on one side only.
    """

    name: str
    kind: str
    what: str = ""
    elements: int = 0
    differing: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    nans: int = 0


def compare(one: Side, other: Side) -> Iterator[Difference]:
    """The tensors that differ, by name. Those whose pieces have the same hashes are alike without being read.

    Raises:
        CorruptCheckpoint: a piece that is read is not the one that was written.
        OSError: a storage failed.
    """
    ours, theirs = set(one.names), set(other.names)
    for name in sorted(ours | theirs):
        if name not in theirs:
            yield Difference(name, "missing", "only the first has it", math.prod(one.manifest.tensors[name].shape))
        elif name not in ours:
            yield Difference(name, "added", "only the second has it", math.prod(other.manifest.tensors[name].shape))
        else:
            found = _compare_tensor(name, one, other)
            if found is not None:
                yield found


def _compare_tensor(name: str, one: Side, other: Side) -> Difference | None:
    mine, its = one.manifest.tensors[name], other.manifest.tensors[name]
    if mine.shape != its.shape:
        return Difference(name, "shape", f"{list(mine.shape)} and {list(its.shape)}", math.prod(mine.shape))
    if mine.dtype == its.dtype and _hashes(mine) == _hashes(its):
        return None
    total = _Sum()
    for begin, end in ranges(mine):
        a = read_range(one.storage, one.manifest, name, begin, end)
        b = read_range(other.storage, other.manifest, name, begin, end)
        if mine.dtype != its.dtype or not np.array_equal(a, b):
            total.add(values(a, mine.dtype), values(b, its.dtype))
    if mine.dtype == its.dtype and not total.differing:
        return None
    kind, what = ("values", "") if mine.dtype == its.dtype else ("dtype", f"{mine.dtype} and {its.dtype}")
    elements = math.prod(mine.shape)
    return Difference(name, kind, what, elements, total.differing, total.max_abs, total.max_rel, total.nans)


class _Sum:
    """What is known of a tensor's differences so far."""

    def __init__(self) -> None:
        self.differing = self.nans = 0
        self.max_abs = self.max_rel = 0.0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        unlike = a != b
        nan_a, nan_b = a != a, b != b  # true of NaN alone, for every dtype
        unlike &= ~(nan_a & nan_b)
        self.differing += int(unlike.sum())
        self.nans += int((nan_a != nan_b).sum())
        unlike &= ~(nan_a | nan_b)
        if not unlike.any():
            return
        distance, scale = _distance(a[unlike], b[unlike])
        with np.errstate(invalid="ignore"):
            relative = np.where(np.isinf(scale), np.inf, distance / scale)
        self.max_abs = max(self.max_abs, float(distance.max()))
        self.max_rel = max(self.max_rel, float(relative.max()))


def _distance(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the elements are apart, and the larger magnitude of the two."""
    if a.dtype == b.dtype and a.dtype.kind in "iu":  # float64 would round integers of more than 53 bits
        distance = np.maximum(a, b).astype(np.uint64) - np.minimum(a, b).astype(np.uint64)
        x, y = a.astype(np.float64), b.astype(np.float64)
    else:
        wide = np.complex128 if np.iscomplexobj(a) or np.iscomplexobj(b) else np.float64
        x, y = a.astype(wide), b.astype(wide)
        distance = np.abs(x - y)
    return distance, np.maximum(np.abs(x), np.abs(y))


def values(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that bit patterns of a safetensors ``dtype`` stand for; in a wider type where numpy has none."""
    if dtype in _PLAIN:
        return bits.view(_PLAIN[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return (bits.astype("<u4") << 16).view("<f4")
    assert ITEMSIZE[dtype] == 1, f"no way to read {dtype}"
    from .tensors import from_array

    return from_array(bits, dtype).float().numpy()


def _hashes(entry: TensorEntry) -> set[tuple[tuple[int, ...], tuple[int, ...], str]]:
    return {(block.offset, block.shape, block.hash) for block in entry.blocks()}
