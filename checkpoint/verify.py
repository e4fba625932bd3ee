"""Whether a checkpoint is what its writer wrote: every byte is read, little of it at a time. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.storage import Storage
from .manifest import CorruptCheckpoint, Manifest, PieceEntry, folder_name
from .reader import open_manifest, runs

_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library takes them


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


_Piece = tuple[str, PieceEntry]


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
        for piece in entry.pieces:
            files.setdefault(piece.file, []).append((fqn, piece))
    for file, pieces in sorted(files.items()):
        pieces.sort(key=lambda item: item[1].begin)
        yield from _verify_file(storage, manifest.step, file, pieces)


def _verify_file(storage: Storage, step: int, file: str, pieces: list[_Piece]) -> Iterator[Damage]:
    name = f"{folder_name(step)}/{file}"
    try:
        size = storage.size(name)
    except FileNotFoundError:
        yield Damage(step, file, "", 0, 0, f"the file is missing, which {_count({fqn for fqn, _ in pieces})}")
        return
    header = _header_fault(storage, name, size, pieces)
    if header:
        yield Damage(step, file, "", 0, pieces[0][1].begin, header)
    there = [item for item in pieces if item[1].end <= size]
    for run in runs(there):
        begin = run[0][1].begin
        data = memoryview(storage.read_range(name, begin, run[-1][1].end))
        for fqn, piece in run:
            if hashlib.sha256(data[piece.begin - begin : piece.end - begin]).hexdigest() != piece.sha256:
                yield Damage(step, file, fqn, piece.begin, piece.end, "not the bytes that were written (sha256)")
    for fqn, piece in pieces[len(there) :]:
        yield Damage(step, file, fqn, piece.begin, piece.end, f"the file is cut short: it has {size} bytes")


def _header_fault(storage: Storage, name: str, size: int, pieces: Sequence[_Piece]) -> str:
    """What is wrong with a shard's safetensors header, which other programs read; empty where nothing is."""
    try:
        length = int.from_bytes(storage.read_range(name, 0, 8), "little")
        if 8 + length > min(size, _LARGEST_HEADER, pieces[0][1].begin):
            return "this is no safetensors header"
        table: dict[str, Any] = json.loads(bytes(storage.read_range(name, 8, 8 + length)))
        table.pop("__metadata__", None)
        places = sorted((*entry["data_offsets"], label) for label, entry in table.items())
    except OSError:
        return "the file ends within its header" if size < 8 else "this is no safetensors header"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "this is no safetensors header"
    spans = iter(places)
    end, label = 0, ""
    for fqn, piece in pieces:
        while piece.begin - 8 - length >= end and piece.end > piece.begin:
            _, end, label = next(spans, (0, size, ""))
        if piece.end > piece.begin and label != fqn and not label.startswith(f"{fqn}["):
            return f"its header does not say that {fqn} is at [{piece.begin}, {piece.end})"
    return ""


def _count(names: set[str]) -> str:
    return f"holds {next(iter(names))}" if len(names) == 1 else f"holds pieces of {len(names)} tensors"
