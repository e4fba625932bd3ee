"""Reading a checkpoint: which there are, and any slices of their tensors, verified. Torch only to make tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..core.storage import Storage
from ..core.tensorfile import ITEMSIZE
from .manifest import MANIFEST, CorruptCheckpoint, Manifest, PieceEntry, folder_name, folder_step, parse

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

#: A slice of a tensor: the index of its first element along each axis, and its extent.
Slice = tuple[tuple[int, ...], tuple[int, ...]]

_READERS = 4  # threads, each with one run in memory
_RUN = 16 << 20  # bytes that are read at once, where pieces follow each other; glibc reuses memory up to 32 MiB


@dataclass(frozen=True)
class Entry:
    """A complete checkpoint in a storage."""

    step: int
    folder: str


def catalogue(storage: Storage) -> list[Entry]:
    """The complete checkpoints, newest first. No manifest is opened."""
    entries = (Entry(step, folder) for folder in storage.folders() if (step := folder_step(folder)) is not None)
    complete = (entry for entry in entries if storage.exists(f"{entry.folder}/{MANIFEST}"))
    return sorted(complete, key=lambda entry: -entry.step)


def open_manifest(storage: Storage, step: int) -> Manifest:
    """The manifest of a checkpoint, checked against itself; no shard is read.

    Raises:
        CorruptCheckpoint: it is missing or not valid.
        JobError: its format is newer than this version reads.
    """
    name = f"{folder_name(step)}/{MANIFEST}"
    try:
        raw = storage.read(name)
    except FileNotFoundError:
        raise CorruptCheckpoint(step, MANIFEST, "", "the file is missing") from None
    return parse(raw, step=step, where=f"{storage}/{name}")


def read(storage: Storage, manifest: Manifest, wanted: Mapping[str, Slice] | None = None) -> dict[str, Tensor]:
    """Tensors on the CPU with exactly the ``wanted`` slices (offset, shape) by name; all whole tensors by default.

    Only the pieces that the slices touch are read, and each is verified before it is used.

    Raises:
        CorruptCheckpoint: a file is missing or cut short, or a piece is not the one that was written.
        KeyError: the checkpoint has no tensor of a wanted name.
        ValueError: a wanted slice leaves its tensor.
    """
    from .tensors import from_array

    arrays = read_arrays(storage, manifest, wanted)
    return {fqn: from_array(array, manifest.tensors[fqn].dtype) for fqn, array in arrays.items()}


def read_arrays(
    storage: Storage, manifest: Manifest, wanted: Mapping[str, Slice] | None = None
) -> dict[str, np.ndarray]:
    """As :func:`read`, as bit patterns: unsigned integers of the element's width (uint8, 16, 32 or 64)."""
    if wanted is None:
        wanted = {fqn: ((0,) * len(entry.shape), entry.shape) for fqn, entry in manifest.tensors.items()}
    pieces = sorted(_touched(manifest, wanted), key=lambda item: (item[1].file, item[1].begin))
    _check_files(storage, manifest.step, pieces)
    arrays = {fqn: np.empty(shape, _bits(manifest, fqn)) for fqn, (_, shape) in wanted.items()}

    def load(run: list[tuple[str, PieceEntry]]) -> None:
        file, begin = run[0][1].file, run[0][1].begin
        data = storage.read_range(f"{folder_name(manifest.step)}/{file}", begin, run[-1][1].end)
        for fqn, piece in run:
            block = memoryview(data)[piece.begin - begin : piece.end - begin]
            if hashlib.sha256(block).hexdigest() != piece.sha256:
                why = f"bytes [{piece.begin}, {piece.end}) do not match their sha256"
                raise CorruptCheckpoint(manifest.step, file, fqn, why)
            box = np.frombuffer(block, arrays[fqn].dtype).reshape(piece.shape)
            _copy_overlap(box, piece.offset, arrays[fqn], wanted[fqn][0])

    _for_each(load, list(runs(pieces)))
    return arrays


def _for_each(load: Callable[[T], None], items: Sequence[T]) -> None:
    """Call ``load`` with each, several at a time: storage takes its time, and hashing one leaves other cores idle."""
    if len(items) < 2:
        for item in items:
            load(item)
        return
    with ThreadPoolExecutor(min(_READERS, len(items)), "dltrain-read") as pool:
        futures = [pool.submit(load, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _touched(manifest: Manifest, wanted: Mapping[str, Slice]) -> Iterator[tuple[str, PieceEntry]]:
    """The pieces that the wanted slices need."""
    for fqn, (offset, shape) in wanted.items():
        if fqn not in manifest.tensors:
            raise KeyError(f"checkpoint {folder_name(manifest.step)} has no tensor {fqn}")
        whole = manifest.tensors[fqn].shape
        if not len(offset) == len(shape) == len(whole) or any(
            begin < 0 or extent < 0 or begin + extent > size
            for begin, extent, size in zip(offset, shape, whole, strict=True)
        ):
            raise ValueError(f"{fqn}: the slice {list(shape)} at {list(offset)} leaves the tensor {list(whole)}")
        for piece in manifest.tensors[fqn].pieces:
            bounds = zip(offset, shape, piece.offset, piece.shape, strict=True)
            if all(max(a, b) < min(a + n, b + m) for a, n, b, m in bounds):
                yield fqn, piece


def _check_files(storage: Storage, step: int, pieces: list[tuple[str, PieceEntry]]) -> None:
    """Every needed file is there and long enough: known before memory is taken for what it should hold."""
    for file, group in groupby(pieces, key=lambda item: item[1].file):
        fqn, last = list(group)[-1]
        try:
            size = storage.size(f"{folder_name(step)}/{file}")
        except FileNotFoundError:
            raise CorruptCheckpoint(step, file, "", "the file is missing") from None
        if size < last.end:
            why = f"the file is cut short: {size} bytes, at least {last.end} expected"
            raise CorruptCheckpoint(step, file, fqn, why)


def runs(pieces: list[tuple[str, PieceEntry]]) -> Iterator[list[tuple[str, PieceEntry]]]:
    """Groups of pieces that follow each other in one file, of ``_RUN`` bytes at most (or one piece)."""
    run: list[tuple[str, PieceEntry]] = []
    for item in pieces:
        if run and (
            item[1].file != run[-1][1].file or item[1].begin != run[-1][1].end or item[1].end - run[0][1].begin > _RUN
        ):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _bits(manifest: Manifest, fqn: str) -> np.dtype:
    return np.dtype(f"<u{ITEMSIZE[manifest.tensors[fqn].dtype]}")


def _copy_overlap(box: np.ndarray, at: tuple[int, ...], out: np.ndarray, offset: tuple[int, ...]) -> None:
    """Copy what ``box`` (at ``at`` in the whole tensor) and ``out`` (at ``offset``) have in common."""
    begin = [max(a, b) for a, b in zip(at, offset, strict=True)]
    end = [min(a + n, b + m) for a, n, b, m in zip(at, box.shape, offset, out.shape, strict=True)]
    source = tuple(slice(lo - a, hi - a) for lo, hi, a in zip(begin, end, at, strict=True))
    target = tuple(slice(lo - b, hi - b) for lo, hi, b in zip(begin, end, offset, strict=True))
    out[target] = box[source]
