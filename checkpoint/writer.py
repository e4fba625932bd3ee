"""Writing a checkpoint: who writes which piece, one shard file a rank, and the manifest last.

Shards may be written by any number of processes at once; only after all of their records have arrived is
:func:`commit` called, by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, JsonValue

from ..core.storage import Storage
from ..core.tensorfile import ITEMSIZE, Item, header, nbytes, order
from .cutting import cut
from .digest import digests
from .manifest import FORMAT, MANIFEST, Cursor, Manifest, PieceEntry, TensorEntry, folder_name

if TYPE_CHECKING:
    from ..core.contracts import ShardedState

# Bytes under one hash, so that a slice can be read and verified alone: about a 128th of the tensor, in these bounds.
_PARTS, _LEAST, _MOST = 128, 256 << 10, 8 << 20
_INLINE = 256 << 10  # bytes that are hashed sooner than a thread can be told to


class PieceKey(NamedTuple):
    """A box of a tensor that some ranks hold: the same key on two ranks is the same data."""

    fqn: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class PieceRecord(BaseModel):
    """A piece that has been written; ``model_dump()`` is JSON-able, to be sent to whoever commits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fqn: str
    dtype: str
    whole: tuple[int, ...]
    """Shape of the tensor that it is a piece of."""
    piece: PieceEntry


def held(shards: ShardedState) -> list[PieceKey]:
    """The pieces that this rank holds, by name.

    Raises:
        TypeError: a tensor's dtype cannot be stored; the message names it.
    """
    from .tensors import code

    keys: list[PieceKey] = []
    for fqn, shard in sorted(shards.items()):
        try:
            dtype = code(shard.data.dtype)
        except TypeError as error:
            raise TypeError(f"{fqn}: {error}") from None
        for box in shard.boxes():
            shape = tuple(box.data.shape)
            keys.append(PieceKey(fqn, tuple(box.offset), shape, dtype, nbytes(dtype, shape)))
    return keys


def assign(holdings: Sequence[Sequence[PieceKey]]) -> list[list[PieceKey]]:
    """For each rank the pieces it writes, when rank ``i`` holds ``holdings[i]``: every distinct piece exactly once.

    The bytes are balanced greedily: pieces with one holder first, then the largest first, each to the holder that
    has the fewest so far (Graham's longest-processing-time rule). The same on every rank that asks.
    """
    holders: dict[PieceKey, list[int]] = {}
    for rank, keys in enumerate(holdings):
        for key in dict.fromkeys(keys):
            holders.setdefault(key, []).append(rank)
    load = [0] * len(holdings)
    chosen: list[list[PieceKey]] = [[] for _ in holdings]
    for key in sorted(holders, key=lambda key: (len(holders[key]) > 1, -key.nbytes, key)):
        rank = min(holders[key], key=lambda rank: (load[rank], len(chosen[rank]), rank))
        load[rank] += key.nbytes
        chosen[rank].append(key)
    return [sorted(keys) for keys in chosen]


class Planned(NamedTuple):
    """A piece that a shard file is to hold, and the shape of the tensor that it is a piece of."""

    key: PieceKey
    whole: tuple[int, ...]


def plan_shard(shards: ShardedState, mine: Sequence[PieceKey]) -> list[Planned]:
    """This rank's pieces in the order in which its shard file holds them.

    Raises:
        ValueError: ``mine`` names a piece that ``shards`` does not hold.
    """
    missing = set(mine) - set(held({key.fqn: shards[key.fqn] for key in mine if key.fqn in shards}))
    if missing:
        raise ValueError(f"this rank does not hold {min(missing)}")
    return sorted((Planned(key, tuple(shards[key.fqn].shape)) for key in mine), key=lambda plan: order(_item(plan)))


def shard_name(rank: int, world: int, save: str = "") -> str:
    """File name of a rank's shard; ``save`` keeps it from any other save's of the same step."""
    return f"shard-{rank:05d}-of-{world:05d}{save and f'-{save}'}.safetensors"


def write_shard(
    storage: Storage, step: int, rank: int, world: int, shards: ShardedState, mine: Sequence[PieceKey]
) -> list[PieceRecord]:
    """Write this rank's pieces as one safetensors file, and say where each landed. A rank with none writes none.

    At most one tensor is copied at a time. A manifest left in the folder by an earlier save of the same step is
    removed first: it would name bytes that are being replaced.

    Raises:
        OSError: the storage failed; nothing that counts as a checkpoint was left.
        ValueError: ``mine`` names a piece that ``shards`` does not hold.
    """
    if not mine:
        return []
    plan = plan_shard(shards, mine)
    storage.remove(f"{folder_name(step)}/{MANIFEST}")
    return write_planned(storage, step, shard_name(rank, world), plan, _live(plan, shards))


def write_planned(
    storage: Storage, step: int, file: str, plan: Sequence[Planned], data: Iterable[memoryview]
) -> list[PieceRecord]:
    """Write a shard file; ``data`` has the bytes of each planned piece.

    Raises:
        OSError: the storage failed; there is no such file then, or the one that there was.
    """
    records = list[PieceRecord]()
    with ThreadPoolExecutor(1, "dltrain-hash") as hasher:
        storage.write(f"{folder_name(step)}/{file}", _stream(plan, data, file, records, hasher))
    return records


def tensor_table(records: Iterable[PieceRecord]) -> dict[str, TensorEntry]:
    """The manifest's tensors from what all ranks wrote.

    Raises:
        ValueError: the pieces of a tensor disagree about it, or do not tile it.
    """
    pieces: dict[str, list[PieceRecord]] = {}
    for record in records:
        pieces.setdefault(record.fqn, []).append(record)
    table: dict[str, TensorEntry] = {}
    for fqn, found in sorted(pieces.items()):
        kinds = {(record.whole, record.dtype) for record in found}
        if len(kinds) > 1:
            raise ValueError(f"{fqn}: ranks disagree about its shape and dtype: {sorted(kinds)}")
        ((whole, dtype),) = kinds
        tiles = sorted((record.piece for record in found), key=lambda piece: (piece.offset, piece.shape))
        table[fqn] = TensorEntry(shape=whole, dtype=dtype, pieces=tuple(tiles))
    return table


def make_manifest(
    records: Iterable[PieceRecord],
    *,
    step: int,
    total_steps: int,
    samples: int,
    world: int,
    job: dict[str, JsonValue],
    rng: dict[str, JsonValue] | None = None,
    tracking: dict[str, JsonValue] | None = None,
    extra: dict[str, JsonValue] | None = None,
) -> Manifest:
    """The manifest of a checkpoint that all ranks have written, as of now.

    Raises:
        ValueError: the records do not tile every tensor exactly.
    """
    return Manifest(
        format=FORMAT,
        dltrain=version("dltrain"),
        created=datetime.now(UTC),
        step=step,
        total_steps=total_steps,
        job=job,
        world=world,
        cursor=Cursor(step=step, samples=samples),
        rng=rng or {},
        tracking=tracking or {},
        extra=extra or {},
        tensors=tensor_table(records),
    )


def commit(storage: Storage, manifest: Manifest) -> None:
    """Make the checkpoint one: write its manifest. Every shard it names must be durable."""
    storage.write(f"{folder_name(manifest.step)}/{MANIFEST}", [manifest.model_dump_json().encode()])


def _item(plan: Planned) -> Item:
    """The piece as its file names it: by its tensor, with the box where it is not the whole."""
    key = plan.key
    if plan.whole == key.shape:
        return Item(key.fqn, key.dtype, key.shape)
    box = ",".join(f"{begin}:{begin + extent}" for begin, extent in zip(key.offset, key.shape, strict=True))
    return Item(f"{key.fqn}[{box}]", key.dtype, key.shape)


def _live(plan: Sequence[Planned], shards: ShardedState) -> Iterator[memoryview]:
    from .tensors import to_bytes

    for key, _ in plan:
        boxes = shards[key.fqn].boxes()
        yield to_bytes(next(box for box in boxes if tuple(box.offset) == key.offset).data)


def _stream(
    plan: Sequence[Planned],
    data: Iterable[memoryview],
    file: str,
    records: list[PieceRecord],
    hasher: ThreadPoolExecutor,
) -> Iterator[bytes | memoryview]:
    """The bytes of the file in order; appends the record of a piece as it goes out, hashed meanwhile."""
    start = header([_item(planned) for planned in plan])
    yield start
    begin = len(start)
    for planned, content in zip(plan, data, strict=True):
        if len(content) <= _INLINE:
            yield content
            records.append(_record(planned, content, file, begin))
        else:
            hashing = hasher.submit(_record, planned, content, file, begin)
            yield content
            records.append(hashing.result())
        begin += len(content)


def _record(planned: Planned, content: memoryview, file: str, begin: int) -> PieceRecord:
    """What one rank holds of a tensor, with the hashes of its blocks; it is at ``begin`` in the file."""
    (key, whole), itemsize = planned, ITEMSIZE[planned.key.dtype]
    limit = max(_LEAST, min(nbytes(key.dtype, whole) // _PARTS, _MOST))
    ends = accumulate(nbytes(key.dtype, shape) for _, shape in cut(key.offset, key.shape, itemsize, limit))
    hashes = digests(content[first:last] for first, last in pairwise((0, *ends)))
    place = {"offset": key.offset, "shape": key.shape, "begin": begin, "end": begin + key.nbytes}
    piece = PieceEntry(file=file, block=limit, hash=hashes, **place)
    return PieceRecord(fqn=key.fqn, dtype=key.dtype, whole=whole, piece=piece)
