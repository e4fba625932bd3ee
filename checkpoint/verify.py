"""Whether a checkpoint is what its writer wrote: every byte is read, little of it at a time. No torch."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.storage import Storage
from ..core.tensorfile import Item, header
from .digest import algorithm, matches
from .manifest import Block, CorruptCheckpoint, Manifest, folder_name
from .reader import open_manifest, runs

_OTHER_HEADER = "its safetensors header is not the one that was written"


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a checkpoint.

    Attributes:
        step: whose it is.
        file: in its folder.
        tensor: whose bytes they are; empty where no single one is meant.
        begin, end: the bytes of the file, the end excluded; both 0 where the whole file is meant.
        why: what is wrong with them.
    """

    step: int
    file: str
    tensor: str
    begin: int
    end: int
    why: str

    def __str__(self) -> str:
        place = f", bytes [{self.begin}, {self.end})" if self.end else ""
        tensor = f", tensor {self.tensor}" if self.tensor else ""
        return f"{folder_name(self.step)}/{self.file}{tensor}{place}: {self.why}"


_Piece = tuple[str, Block]


def verify(storage: Storage, step: int) -> Iterator[Damage]:
    """Read the whole checkpoint of ``step``, and give all that is wrong with it; nothing of one that is whole.

    Takes the memory of its manifest and of 16 MiB, or of one piece where that is larger.

    Raises:
        JobError: its format is newer than this version reads.
        OSError: the storage failed.
    """
    try:
        manifest = open_manifest(storage, step)
    except CorruptCheckpoint as error:
        yield Damage(step, error.file, error.tensor, 0, 0, error.why)
        return
    yield from verify_tensors(storage, manifest)


def verify_tensors(storage: Storage, manifest: Manifest) -> Iterator[Damage]:
    """What is wrong with the shards of a checkpoint whose manifest is in order.

    Raises:
        OSError: the storage failed.
    """
    files: dict[str, list[_Piece]] = {}
    for fqn, entry in manifest.tensors.items():
        for piece in entry.blocks():
            files.setdefault(piece.file, []).append((fqn, piece))
    for file, pieces in sorted(files.items()):
        pieces.sort(key=lambda item: item[1].begin)
        yield from _verify_file(storage, manifest, file, pieces)


def _verify_file(storage: Storage, manifest: Manifest, file: str, pieces: list[_Piece]) -> Iterator[Damage]:
    step = manifest.step
    name = f"{folder_name(step)}/{file}"
    try:
        size = storage.size(name)
    except FileNotFoundError:
        yield Damage(step, file, "", 0, 0, f"the file is missing, which {_count({fqn for fqn, _ in pieces})}")
        return
    fault = _header_fault(storage, manifest, name, size, pieces)
    if fault:
        yield Damage(step, file, "", 0, 0, fault)
    there = [item for item in pieces if item[1].end <= size]
    for run in runs(there):
        begin = run[0][1].begin
        data = memoryview(storage.read_range(name, begin, run[-1][1].end))
        for fqn, piece in run:
            if not matches(data[piece.begin - begin : piece.end - begin], piece.hash):
                why = f"not the bytes that were written ({algorithm(piece.hash)})"
                yield Damage(step, file, fqn, piece.begin, piece.end, why)
    for fqn, piece in pieces[len(there) :]:
        yield Damage(step, file, fqn, piece.begin, piece.end, f"the file is cut short: it has {size} bytes")


def _header_fault(storage: Storage, manifest: Manifest, name: str, size: int, pieces: Sequence[_Piece]) -> str:
    """What is wrong with a shard's safetensors header, which other programs read; empty where nothing is."""
    try:
        length = int.from_bytes(storage.read_range(name, 0, min(8, size)), "little")
        if not size >= pieces[0][1].begin >= 8 + length:
            return "the file has no whole safetensors header"
        raw = bytes(storage.read_range(name, 0, 8 + length))
        table: dict[str, Any] = json.loads(raw[8:])
        metadata = table.pop("__metadata__")
        spans = sorted((*entry["data_offsets"], label) for label, entry in table.items())
        items = [Item(label, table[label]["dtype"], tuple(table[label]["shape"])) for _, _, label in spans]
        if metadata["format"] != "pt" or header(items, metadata) != raw:
            return _OTHER_HEADER
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _OTHER_HEADER
    expected = _items(manifest, pieces, [(len(raw) + begin, len(raw) + end) for begin, end, _ in spans])
    if expected != sorted(items, key=lambda item: item.name):
        return _OTHER_HEADER
    end = len(raw) + max((end for _, end, _ in spans), default=0)
    return f"the file is longer than the {end} bytes that it holds" if size > end else ""


def _items(manifest: Manifest, pieces: Sequence[_Piece], spans: Sequence[tuple[int, int]]) -> list[Item]:
    """The entries that a shard's header should have, by name: one for the pieces in each of its spans of bytes."""
    items = [_item(manifest, [item]) for item in pieces if item[1].begin == item[1].end]
    left = deque(item for item in pieces if item[1].begin < item[1].end)
    for begin, end in spans:
        held: list[_Piece] = []
        while left and begin <= left[0][1].begin < end:
            held.append(left.popleft())
        if held:
            items.append(_item(manifest, held))
    return sorted(items, key=lambda item: item.name)


def _item(manifest: Manifest, held: Sequence[_Piece]) -> Item:
    """The entry of a box that was cut into the pieces ``held``."""
    fqn = held[0][0]
    entry = manifest.tensors[fqn]
    edges = [zip(piece.offset, piece.shape, strict=True) for _, piece in held]
    bounds = [
        (min(begin for begin, _ in axis), max(begin + extent for begin, extent in axis))
        for axis in zip(*edges, strict=True)
    ]
    shape = tuple(end - begin for begin, end in bounds)
    box = ",".join(f"{begin}:{end}" for begin, end in bounds)
    return Item(fqn if shape == entry.shape else f"{fqn}[{box}]", entry.dtype, shape)


def _count(names: set[str]) -> str:
    return f"holds {next(iter(names))}" if len(names) == 1 else f"holds pieces of {len(names)} tensors"
