"""One rank's part of a snapshot as it lies in memory, for whoever reads it there when the rank is gone. No torch.

    page 0     the head; its last word says whether the rest counts
    then       the pieces' bytes
    then       three lines of JSON: what the pieces are, the facts of a manifest, and rows of metrics

The rank takes the last word away before it touches the rest, and gives it back when all is there. So an image that was
being written when its rank died does not count. Whoever copies one while its rank lives looks at the head before and
after: it is numbered. Bytes carry no hash: they have not been on a disk.

Page 0 has a word of the agent's too: the number of the image that another node has a copy of.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from math import prod
from typing import Any

from .manifest import FORMAT, CorruptCheckpoint, Cursor, Manifest, PieceEntry, TensorEntry, folder_name
from .reader import Slice

DATA = 4096
"""Where the pieces begin."""

_MAGIC = 0x64_6C_74_72_69_6D_67_31
_HEAD = struct.Struct("@12q")
_WORD = struct.Struct("@q")
_COUNTS_AT = _HEAD.size - _WORD.size
_MARKED_AT = _COUNTS_AT - _WORD.size
_COPIED_AT = 1024


@dataclass(frozen=True)
class Head:
    """What page 0 says.

    Attributes:
        number: of this writing of the memory: it rises.
        generation, step, rank, world: whose snapshot of when.
        row: step of the newest row of metrics before it; 0 where there is none.
        capacity: bytes that pieces have room in.
        data: bytes that the pieces take.
        text: bytes of the lines.
        marked: 1 where another node is to hold a copy, for as long as the rank keeps the image for that.
    """

    number: int
    generation: int
    step: int
    rank: int
    world: int
    row: int
    capacity: int
    data: int
    text: int
    marked: int

    @property
    def size(self) -> int:
        """Bytes of the whole image."""
        return DATA + self.capacity + self.text


def put_head(page: mmap.mmap, head: Head, *, counts: bool) -> None:
    """Write the head; the word that makes the image count comes last."""
    _WORD.pack_into(page, _COUNTS_AT, 0)
    _HEAD.pack_into(page, 0, _MAGIC, *astuple(head), 0)
    if counts:
        _WORD.pack_into(page, _COUNTS_AT, 1)


def unmark(page: mmap.mmap) -> None:
    """Say that the rank does not keep the image for a copy any more."""
    _WORD.pack_into(page, _MARKED_AT, 0)


def note_copied(fd: int, number: int) -> None:
    """Say that another node has a copy of the image of this number."""
    os.pwrite(fd, _WORD.pack(number), _COPIED_AT)


def number_copied(fd: int) -> int:
    """The number of the image that another node has a copy of; 0 where there was none."""
    raw = os.pread(fd, _WORD.size, _COPIED_AT)
    return _WORD.unpack(raw)[0] if len(raw) == _WORD.size else 0


def read_head(fd: int) -> tuple[Head, bool] | None:
    """The head behind a descriptor, and whether the image counts; None where there is none."""
    raw = os.pread(fd, _HEAD.size, 0)
    if len(raw) < _HEAD.size:
        return None
    magic, *values, counts = _HEAD.unpack(raw)
    return (Head(*values), counts == 1) if magic == _MAGIC else None


class Image:
    """An image that counts, to be read.

    Raises:
        ValueError: it does not count.
    """

    def __init__(self, fd: int) -> None:
        found = read_head(fd)
        if found is None or not found[1]:
            raise ValueError("the memory holds no complete image")
        self.head = found[0]
        self._memory = mmap.mmap(fd, self.head.size, prot=mmap.PROT_READ)
        begin = DATA + self.head.capacity
        static, facts, rows = self._memory[begin : begin + self.head.text].split(b"\n")
        self._static: dict[str, Any] = json.loads(static)
        self._facts: dict[str, Any] = json.loads(facts)
        self.rows: list[dict[str, Any]] = json.loads(rows)

    @property
    def data(self) -> memoryview:
        """The bytes of the pieces."""
        return memoryview(self._memory)[DATA : DATA + self.head.data]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a manifest says beside the tensors: ``job``, ``samples``, ``total_steps``, ``extra`` and so on."""
        return {name: value for name, value in self._static.items() if name != "plan"} | self._facts

    def pieces(self, file: str) -> Iterator[tuple[str, str, tuple[int, ...], PieceEntry]]:
        """Name, dtype and whole shape of each piece's tensor, and the piece, as if it lay in ``file``."""
        for fqn, offset, shape, dtype, nbytes, whole, begin in self._static["plan"]:
            piece = PieceEntry.model_construct(
                file=file, offset=tuple(offset), shape=tuple(shape), begin=begin, end=begin + nbytes, hash=""
            )
            yield fqn, dtype, tuple(whole), piece


class Images:
    """Images of one snapshot, from any number of its ranks: read as a checkpoint's files are.

    Attributes:
        manifest: of what the images hold, which may be a part of the tensors. It is not checked as one on a disk is.
    """

    def __init__(self, images: Sequence[Image]) -> None:
        self._images = {f"rank-{image.head.rank}": image for image in images}
        first = images[0]
        heads = [image.head for image in images]
        if len({(head.generation, head.step, head.world) for head in heads}) > 1:
            raise ValueError(f"images of several snapshots: {heads}")
        self.step, self.world = first.head.step, first.head.world
        self.manifest = self._manifest(first.facts)

    @property
    def whole(self) -> bool:
        """Whether every rank's image is here."""
        return len(self._images) == self.world

    def size(self, name: str) -> int:
        """Length of a file of the manifest."""
        return len(self._of(name).data)

    def fill(self, name: str, begin: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        """The bytes of a file of the manifest from ``begin`` on, into one buffer after the other; gives each."""
        data = self._of(name).data
        for buffer in buffers:
            end = begin + len(buffer)
            buffer[:] = data[begin:end]
            begin = end
            yield buffer

    def check_holds(self, wanted: Mapping[str, Sequence[Slice]]) -> None:
        """See that the images hold the ``wanted`` slices, by name.

        Raises:
            CorruptCheckpoint: they do not: some of the ranks' images are missing.
        """
        for fqn, slices in wanted.items():
            entry = self.manifest.tensors.get(fqn)
            if entry is None and self.whole:
                continue  # it is not in the snapshot, as optimizers' state is not before their first step
            pieces = entry.pieces if entry is not None else ()
            found = sum(_shared(part, piece) for part in slices for piece in pieces)
            all_of_it = sum(prod(shape) for _, shape in slices)
            if found != all_of_it:
                why = f"{found} of {all_of_it} elements are held here"
                raise CorruptCheckpoint(self.step, f"{len(self._images)} images in memory", fqn, why)

    def _of(self, name: str) -> Image:
        return self._images[name.rpartition("/")[2]]

    def _manifest(self, facts: Mapping[str, Any]) -> Manifest:
        tensors: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], PieceEntry]] = {}
        kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file, image in self._images.items():
            for fqn, dtype, whole, piece in image.pieces(file):
                kinds[fqn] = dtype, whole
                tensors.setdefault(fqn, {}).setdefault((piece.offset, piece.shape), piece)  # nodes hold the same ones
        return Manifest.model_construct(
            format=FORMAT,
            dltrain=version("dltrain"),
            created=datetime.now(UTC),
            step=self.step,
            world=self.world,
            cursor=Cursor(step=self.step, samples=facts["samples"]),
            tensors={
                fqn: TensorEntry.model_construct(shape=kinds[fqn][1], dtype=kinds[fqn][0], pieces=tuple(by.values()))
                for fqn, by in sorted(tensors.items())
            },
            **{name: facts[name] for name in ("total_steps", "job", "rng", "tracking", "extra")},
        )

    def __str__(self) -> str:
        return f"{folder_name(self.step)} in memory"


def _shared(part: Slice, piece: PieceEntry) -> int:
    """How many elements a slice and a piece have in common."""
    bounds = zip(*part, piece.offset, piece.shape, strict=True)
    return prod(max(0, min(a + n, b + m) - max(a, b)) for a, n, b, m in bounds)
