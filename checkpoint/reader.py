"""Reading a checkpoint: which there are, and any slices of their tensors, verified. Torch only to make tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from ..core.storage import Storage
from ..core.tensorfile import ITEMSIZE
from .digest import algorithm, matches
from .manifest import MANIFEST, Block, CorruptCheckpoint, Manifest, folder_name, folder_step, parse

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
P = TypeVar("P", bound=tuple[Any, ...])

#: A slice of a tensor: the index of its first element along each axis, and its extent.
Slice = tuple[tuple[int, ...], tuple[int, ...]]

_READERS = 4  # threads, each with one run in memory
_RUN = 16 << 20  # bytes that are read at once, where pieces follow each other; glibc reuses memory up to 32 MiB


class Files(Protocol):
    """Where a checkpoint's bytes come from: a storage, or images in memory."""

    def size(self, name: str) -> int:
        """Length of the file in bytes. Raises FileNotFoundError."""
        ...

    def fill(self, name: str, begin: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        """The bytes of the file from ``begin`` on, into one buffer of bytes after the other; gives each when full."""
        ...


@dataclass(frozen=True)
class Entry:
    """A complete checkpoint in a storage."""

    step: int
    folder: str


class Target(NamedTuple):
    """Where a slice of a tensor is to go.

    Attributes:
        offset: index of the slice's first element along each axis.
        array: of the slice's shape; takes the bit patterns, so its dtype is :func:`bits`'s.
    """

    offset: tuple[int, ...]
    array: np.ndarray


class _Load(NamedTuple):
    """A block to be read, and the numbers of the targets of its tensor that it has a part of."""

    fqn: str
    piece: Block
    targets: list[int]


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


def read(storage: Files, manifest: Manifest, wanted: Mapping[str, Slice] | None = None) -> dict[str, Tensor]:
    """Tensors on the CPU with exactly the ``wanted`` slices (offset, shape) by name; all whole tensors by default.

    Raises:
        As :func:`read_into`.
    """
    from .tensors import from_array

    arrays = read_arrays(storage, manifest, wanted)
    return {fqn: from_array(array, manifest.tensors[fqn].dtype) for fqn, array in arrays.items()}


def read_arrays(storage: Files, manifest: Manifest, wanted: Mapping[str, Slice] | None = None) -> dict[str, np.ndarray]:
    """As :func:`read`, as bit patterns: unsigned integers of the element's width (uint8, 16, 32 or 64)."""
    if wanted is None:
        wanted = {fqn: ((0,) * len(entry.shape), entry.shape) for fqn, entry in manifest.tensors.items()}
    loads = _loads(manifest, {fqn: [(offset, shape)] for fqn, (offset, shape) in wanted.items()})
    _check_files(storage, manifest.step, loads)  # before memory is taken for what they should hold
    arrays = {fqn: np.empty(shape, bits(manifest, fqn)) for fqn, (_, shape) in wanted.items()}
    _carry_out(storage, manifest, loads, {fqn: [Target(wanted[fqn][0], array)] for fqn, array in arrays.items()})
    return arrays


def read_into(storage: Files, manifest: Manifest, targets: Mapping[str, Sequence[Target]]) -> None:
    """Fill each target with the slice of its tensor.

    Only the pieces that the slices touch are read, each once, and straight into the target where it lies there in one
    run. Each is verified: when this returns all targets hold what was written, when it raises they hold anything.

    Raises:
        CorruptCheckpoint: a file is missing or cut short, or a piece is not the one that was written.
        KeyError: the checkpoint has no tensor of a wanted name.
        ValueError: a wanted slice leaves its tensor.
    """
    slices = {fqn: [(target.offset, target.array.shape) for target in of_it] for fqn, of_it in targets.items()}
    loads = _loads(manifest, slices)
    _check_files(storage, manifest.step, loads)
    _carry_out(storage, manifest, loads, targets)


def bits(manifest: Manifest, fqn: str) -> np.dtype:
    """The numpy dtype of a tensor's bit patterns."""
    return np.dtype(f"<u{ITEMSIZE[manifest.tensors[fqn].dtype]}")


def _carry_out(storage: Files, manifest: Manifest, loads: list[_Load], targets: Mapping[str, Sequence[Target]]) -> None:
    def load(run: list[_Load]) -> None:
        file, begin = run[0].piece.file, run[0].piece.begin
        places = [[targets[item.fqn][number] for number in item.targets] for item in run]
        straight = [_straight(item.piece, of_it) for item, of_it in zip(run, places, strict=True)]
        buffers = [
            np.empty(item.piece.end - item.piece.begin, np.uint8) if found is None else found[1]
            for item, found in zip(run, straight, strict=True)
        ]
        full = storage.fill(f"{folder_name(manifest.step)}/{file}", begin, [buffer.data for buffer in buffers])
        for (fqn, piece, _), of_it, found, buffer, read in zip(run, places, straight, buffers, full, strict=True):
            if piece.hash and not matches(read, piece.hash):  # what lies in memory has none
                why = f"bytes [{piece.begin}, {piece.end}) do not match their {algorithm(piece.hash)}"
                raise CorruptCheckpoint(manifest.step, file, fqn, why)
            for target in of_it:
                if found is None or target is not found[0]:
                    _copy_overlap(buffer.view(bits(manifest, fqn)).reshape(piece.shape), piece.offset, target)

    _for_each(load, list(runs(loads)))


def _straight(piece: Block, targets: Sequence[Target]) -> tuple[Target, np.ndarray] | None:
    """A target that the piece's bytes follow each other in, and these bytes of it; None where there is no such."""
    for target in targets:
        begin = [a - b for a, b in zip(piece.offset, target.offset, strict=True)]
        end = [first + extent for first, extent in zip(begin, piece.shape, strict=True)]
        if min(begin, default=0) >= 0 and all(e <= n for e, n in zip(end, target.array.shape, strict=True)):
            box = target.array[(*map(slice, begin, end), ...)]
            if box.flags.c_contiguous:
                return target, box.reshape(-1).view(np.uint8)
    return None


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


def _loads(manifest: Manifest, wanted: Mapping[str, Sequence[Slice]]) -> list[_Load]:
    """The pieces that the wanted slices need, in the order of the files."""
    found: list[_Load] = []
    for fqn, slices in wanted.items():
        if fqn not in manifest.tensors:
            raise KeyError(f"checkpoint {folder_name(manifest.step)} has no tensor {fqn}")
        whole = manifest.tensors[fqn].shape
        for offset, shape in slices:
            if not len(offset) == len(shape) == len(whole) or any(
                begin < 0 or extent < 0 or begin + extent > size
                for begin, extent, size in zip(offset, shape, whole, strict=True)
            ):
                raise ValueError(f"{fqn}: the slice {list(shape)} at {list(offset)} leaves the tensor {list(whole)}")
        for piece in manifest.tensors[fqn].pieces:
            near = [number for number, part in enumerate(slices) if _overlap(part, (piece.offset, piece.shape))]
            for block in piece.blocks(bits(manifest, fqn).itemsize) if near else ():
                touching = [number for number in near if _overlap(slices[number], (block.offset, block.shape))]
                if touching:
                    found.append(_Load(fqn, block, touching))
    return sorted(found, key=lambda item: (item.piece.file, item.piece.begin))


def _overlap(one: Slice, other: Slice) -> bool:
    return all(max(a, b) < min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True))


def _check_files(storage: Files, step: int, loads: list[_Load]) -> None:
    """Raise CorruptCheckpoint unless every needed file is there and long enough."""
    for file, group in groupby(loads, key=lambda item: item.piece.file):
        fqn, last, _ = list(group)[-1]
        try:
            size = storage.size(f"{folder_name(step)}/{file}")
        except FileNotFoundError:
            raise CorruptCheckpoint(step, file, "", "the file is missing") from None
        if size < last.end:
            why = f"the file is cut short: {size} bytes, at least {last.end} expected"
            raise CorruptCheckpoint(step, file, fqn, why)


def runs(pieces: list[P]) -> Iterator[list[P]]:
    """Groups of pieces that follow each other in one file, of ``_RUN`` bytes at most (or one piece).

    Each is a tuple of a tensor's name, the piece, and anything else.
    """
    run: list[P] = []
    for item in pieces:
        if run and (
            item[1].file != run[-1][1].file or item[1].begin != run[-1][1].end or item[1].end - run[0][1].begin > _RUN
        ):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _copy_overlap(box: np.ndarray, at: tuple[int, ...], target: Target) -> None:
    """Copy what ``box`` (at ``at`` in the whole tensor) and ``target`` have in common."""
    out, offset = target.array, target.offset
    begin = [max(a, b) for a, b in zip(at, offset, strict=True)]
    end = [min(a + n, b + m) for a, n, b, m in zip(at, box.shape, offset, out.shape, strict=True)]
    source = tuple(slice(lo - a, hi - a) for lo, hi, a in zip(begin, end, at, strict=True))
    place = tuple(slice(lo - b, hi - b) for lo, hi, b in zip(begin, end, offset, strict=True))
    out[place] = box[source]
