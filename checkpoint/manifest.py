"""``manifest.json``: what a checkpoint holds, and where each byte of it lies. No torch.

A checkpoint is the folder ``step-%08d`` with safetensors shards and, written last, the manifest. A folder without a
manifest is no checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from ..core.errors import JobError, Problem, RunFailed
from ..core.tensorfile import ITEMSIZE, nbytes
from .cutting import count, cut
from .digest import HEX, PATTERN, algorithm

FORMAT = 3
MANIFEST = "manifest.json"

_FOLDER = re.compile(r"step-(\d{8,15})")
_Index = Annotated[int, Field(ge=0, lt=2**63)]
_Shape = Annotated[tuple[_Index, ...], Field(max_length=64, strict=False)]  # JSON has lists


class CorruptCheckpoint(RunFailed):
    """A checkpoint is not what its writer wrote; it must not be used.

    Attributes:
        step, file, tensor: where; ``tensor`` is empty when no single one is meant.
        why: what is wrong.
    """

    def __init__(self, step: int, file: str, tensor: str, why: str) -> None:
        self.step, self.file, self.tensor, self.why = step, file, tensor, why
        subject = f"{file}, tensor {tensor}" if tensor else file
        super().__init__(f"checkpoint {folder_name(step)} is corrupt: {subject}: {why}")


def folder_name(step: int) -> str:
    """Name of the folder of the checkpoint taken after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def folder_step(name: str) -> int | None:
    """The step of a checkpoint folder; None for a folder of another name."""
    match = _FOLDER.fullmatch(name)
    step = int(match[1]) if match else -1
    return step if step >= 0 and folder_name(step) == name else None


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")


class Block(NamedTuple):
    """A box of a tensor, the bytes of a file that hold it, and their hash: what is read and verified at once."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    begin: int
    end: int
    hash: str


class PieceEntry(_Strict):
    """A box of a tensor, and the bytes of a file that hold it, row-major and little-endian.

    One rank wrote it, and it has a hash for each of its blocks: see :func:`~.cutting.cut`.
    """

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$", max_length=255)
    """File in the checkpoint's folder."""
    offset: _Shape
    """Index of the box's first element along each axis."""
    shape: _Shape
    """Extent of the box along each axis."""
    begin: _Index
    """First byte in the file."""
    end: _Index
    """One past the last byte in the file."""
    block: _Index = 0
    """Bytes that a block has at most; 0 where all of the piece is one."""
    hash: str = Field(pattern=PATTERN)
    """Algorithm, and the hashes of the blocks one after the other."""

    def blocks(self, itemsize: int) -> Iterator[Block]:
        """Its blocks in the order of their bytes; of a tensor whose elements have ``itemsize`` bytes."""
        if not self.block:
            yield Block(self.file, self.offset, self.shape, self.begin, self.end, self.hash)
            return
        kind, begin = f"{algorithm(self.hash)}:", self.begin
        at = len(kind)
        for offset, shape in cut(self.offset, self.shape, itemsize, self.block):
            end = begin + math.prod(shape) * itemsize
            yield Block(self.file, offset, shape, begin, end, kind + self.hash[at : at + HEX])
            begin, at = end, at + HEX


class TensorEntry(_Strict):
    """A whole tensor, tiled exactly by its pieces."""

    shape: _Shape
    dtype: str
    """Code of the safetensors format, such as F32 or BF16."""
    pieces: tuple[PieceEntry, ...]

    def blocks(self) -> Iterator[Block]:
        """The blocks of all pieces."""
        for piece in self.pieces:
            yield from piece.blocks(ITEMSIZE[self.dtype])

    @model_validator(mode="after")
    def _tiled(self) -> Self:
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"unknown dtype {self.dtype!r}")
        for piece in self.pieces:
            self._check_piece(piece)
        covered, volume = sum(math.prod(piece.shape) for piece in self.pieces), math.prod(self.shape)
        if covered != volume:
            raise ValueError(f"the pieces hold {covered} elements, the tensor {volume}")
        if _overlap(self.pieces):
            raise ValueError("two pieces overlap")
        return self

    def _check_piece(self, piece: PieceEntry) -> None:
        if not len(piece.offset) == len(piece.shape) == len(self.shape):
            raise ValueError(f"a piece with {len(piece.shape)} axes of a tensor with {len(self.shape)}")
        if any(o + n > size for o, n, size in zip(piece.offset, piece.shape, self.shape, strict=True)):
            box = f"{list(piece.shape)} at {list(piece.offset)}"
            raise ValueError(f"the piece {box} leaves the tensor {list(self.shape)}")
        if piece.end - piece.begin != nbytes(self.dtype, piece.shape):
            raise ValueError(
                f"{piece.end - piece.begin} bytes for a piece of {list(piece.shape)} {self.dtype}, "
                f"which has {nbytes(self.dtype, piece.shape)}"
            )
        blocks = count(piece.shape, ITEMSIZE[self.dtype], piece.block) if piece.block else 1
        if len(piece.hash) != len(algorithm(piece.hash)) + 1 + HEX * blocks:
            raise ValueError(f"a piece of {blocks} blocks, and not as many hashes")


class Cursor(_Strict):
    """How far the run has come."""

    step: _Index
    """Optimizer steps done."""
    samples: _Index
    """Samples consumed, over all ranks."""


class Manifest(_Strict):
    """A complete checkpoint."""

    format: Literal[3]
    """Version of this layout."""
    dltrain: str
    """Version of the writer."""
    created: AwareDatetime
    step: _Index
    """Optimizer steps done."""
    total_steps: _Index
    """Optimizer steps of the whole run."""
    job: dict[str, JsonValue]
    """The resolved job."""
    world: int = Field(gt=0)
    """Ranks that wrote it."""
    cursor: Cursor
    rng: dict[str, JsonValue]
    """What the keyed randomness continues from."""
    tracking: dict[str, JsonValue]
    """What the tracker continues from: the run's id, the last step it logged."""
    extra: dict[str, JsonValue]
    """Other small values, by name."""
    tensors: dict[Annotated[str, Field(min_length=1)], TensorEntry]
    """By fully qualified name."""

    @model_validator(mode="after")
    def _bytes_once(self) -> Self:
        pieces = (piece for tensor in self.tensors.values() for piece in tensor.pieces if piece.end > piece.begin)
        ranges = sorted((piece.file, piece.begin, piece.end) for piece in pieces)
        for (file, _, end), (other, begin, stop) in pairwise(ranges):
            if file == other and begin < min(end, stop):
                raise ValueError(f"two pieces share bytes [{begin}, {min(end, stop)}) of {file}")
        return self


def parse(raw: bytes, *, step: int, where: str) -> Manifest:
    """The manifest of the checkpoint of ``step``, fully checked.

    Raises:
        CorruptCheckpoint: it is no manifest, or contradicts itself.
        JobError: its format is newer than this version can read; ``where`` says which file it is.
    """
    try:
        values = json.loads(raw)
        text = _of_older(values) if _version(values) in (1, 2) else raw
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(step, MANIFEST, "", f"not JSON ({error})") from None
    _refuse_newer(values, where)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise _corrupt(step, error) from None
    if manifest.step != step:
        raise CorruptCheckpoint(step, MANIFEST, "", f"it is the manifest of step {manifest.step}")
    return manifest


def _refuse_newer(values: Any, where: str) -> None:
    version = _version(values)
    if version is not None and version > FORMAT:
        writer = values.get("dltrain")
        by = f", written by dltrain {writer[:40]!r}" if isinstance(writer, str) else ""
        what = f"checkpoint format {version}{by}; this version reads up to format {FORMAT}"
        raise JobError(Problem(what, where, "install a newer dltrain"))


def _version(values: Any) -> int | None:
    version = values.get("format") if isinstance(values, Mapping) else None
    return version if isinstance(version, int) and not isinstance(version, bool) else None


def _of_older(values: dict[str, Any]) -> str:
    """The text of a manifest of format 1 or 2 as one of this format.

    Both had an entry for every block. Format 1 knew SHA-256 alone. What does not look like one is left as it is: the
    check that follows says what is wrong.
    """
    tensors = values.get("tensors") if _version(values) == 1 else None
    for entry in tensors.values() if isinstance(tensors, dict) else ():
        pieces = entry.get("pieces") if isinstance(entry, dict) else None
        for piece in pieces if isinstance(pieces, list) else ():
            if isinstance(piece, dict) and "hash" not in piece and "sha256" in piece:
                piece["hash"] = f"sha256:{piece.pop('sha256')}"
    return json.dumps({**values, "format": FORMAT})


def _corrupt(step: int, error: ValidationError) -> CorruptCheckpoint:
    first = error.errors(include_url=False, include_input=False)[0]
    place, tensor = list(first["loc"]), ""
    if place[:1] == ["tensors"] and len(place) > 1:
        tensor, place = str(place[1]), place[2:]
    key = ".".join(map(str, place))
    return CorruptCheckpoint(step, MANIFEST, tensor, f"{key}: {first['msg']}" if key else first["msg"])


def _overlap(pieces: Sequence[PieceEntry]) -> bool:
    """Whether two boxes share an element: a sweep along the axis that separates most of them."""
    boxes = [piece for piece in pieces if math.prod(piece.shape)]
    if len(boxes) < 2:
        return False
    axes = range(len(boxes[0].shape))
    axis = max(axes, key=lambda a: len({box.offset[a] for box in boxes}), default=None)
    if axis is None:
        return True
    open_boxes: list[PieceEntry] = []
    for box in sorted(boxes, key=lambda b: b.offset[axis]):
        open_boxes = [other for other in open_boxes if other.offset[axis] + other.shape[axis] > box.offset[axis]]
        for other in open_boxes:
            if all(_share(box, other, a) for a in axes):
                return True
        open_boxes.append(box)
    return False


def _share(one: PieceEntry, other: PieceEntry, axis: int) -> bool:
    return max(one.offset[axis], other.offset[axis]) < min(
        one.offset[axis] + one.shape[axis], other.offset[axis] + other.shape[axis]
    )
