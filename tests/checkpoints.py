"""States with awkward tensors, ways to cut them over ranks, and checkpoints of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from dltrain.checkpoint import tensors
from dltrain.checkpoint.manifest import CorruptCheckpoint, Manifest
from dltrain.checkpoint.reader import catalogue, open_manifest, read
from dltrain.checkpoint.writer import (
    PieceRecord,
    assign,
    commit,
    held,
    make_manifest,
    write_shard,
)
from dltrain.core.contracts import Shard, ShardedState
from dltrain.core.storage import Storage
from torch import Tensor

State = dict[str, Tensor]


def make_state(seed: int = 0) -> State:
    """A model of one part with a tied weight, and moments; every awkward layout in it."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    table = normal(24, 10)
    return {
        "model.net.embed.weight": table,
        "model.net.head.weight": table,
        "model.net.norm.weight": normal(7).to(torch.bfloat16),
        "model.net.turned": normal(6, 4).t(),
        "model.net.conv": normal(8, 4, 3, 3).to(memory_format=torch.channels_last),
        "model.net.tracked": torch.tensor(2**40 + seed),
        "model.net.none": torch.empty(0, 5),
        "optimizer.net.embed.weight.exp_avg": normal(24, 10),
        "optimizer.net.embed.weight.step": torch.tensor(float(seed)),
    }


def rows(state: Mapping[str, Tensor], world: int) -> list[dict[str, Shard]]:
    """What each of ``world`` ranks holds when tensors are cut along axis 0 (as FSDP does); 0-dim ones are replicas."""
    ranks: list[dict[str, Shard]] = [{} for _ in range(world)]
    for fqn, tensor in state.items():
        shape = tuple(tensor.shape)
        cuts = torch.arange(shape[0] if shape else 0).chunk(world) if shape and shape[0] else ()
        for rank in range(world):
            if not shape:
                ranks[rank][fqn] = Shard(shape, (), tensor)
            elif rank < len(cuts):
                first, count = int(cuts[rank][0]), len(cuts[rank])
                ranks[rank][fqn] = Shard(shape, (first, *(0 for _ in shape[1:])), tensor[first : first + count])
            elif not cuts and rank == 0:
                ranks[0][fqn] = Shard(shape, tuple(0 for _ in shape), tensor)
    return ranks


def grid(state: Mapping[str, Tensor]) -> list[dict[str, Shard]]:
    """Four ranks that cut matrices in a 2 x 2 grid; the rest are replicas on all."""
    ranks: list[dict[str, Shard]] = [{} for _ in range(4)]
    for fqn, tensor in state.items():
        shape = tuple(tensor.shape)
        for rank, (row, column) in enumerate(product((0, 1), (0, 1))):
            if len(shape) != 2 or not tensor.numel():
                ranks[rank][fqn] = Shard(shape, tuple(0 for _ in shape), tensor)
                continue
            top, left = row * (shape[0] // 2), column * (shape[1] // 2)
            bottom, right = (shape[0] if row else shape[0] // 2), (shape[1] if column else shape[1] // 2)
            ranks[rank][fqn] = Shard(shape, (top, left), tensor[top:bottom, left:right])
    return ranks


def whole(state: Mapping[str, Tensor], world: int) -> list[dict[str, Shard]]:
    """Every rank holds everything (as DDP does)."""
    shards = {fqn: Shard(tuple(t.shape), tuple(0 for _ in t.shape), t) for fqn, t in state.items()}
    return [shards] * world


def save(storage: Storage, step: int, ranks: Sequence[ShardedState], **extra: Any) -> Manifest:
    world, records = len(ranks), list[PieceRecord]()
    shares = assign([held(shards) for shards in ranks])
    for rank, shards in enumerate(ranks):
        records += write_shard(storage, step, rank, world, shards, shares[rank])
    # Records reach the committing process as JSON.
    records = [PieceRecord.model_validate(json.loads(json.dumps(record.model_dump()))) for record in records]
    manifest = make_manifest(
        records, step=step, total_steps=1000, samples=step * 64, world=world, job={"name": "t"}, extra=extra
    )
    commit(storage, manifest)
    return manifest


def held_by_one(storage: Storage, step: int, state: Mapping[str, Tensor]) -> list[PieceRecord]:
    """Write the shard of a world of one rank; what its manifest needs."""
    shards = whole(state, 1)[0]
    return write_shard(storage, step, 0, 1, shards, assign([held(shards)])[0])


def bit_equal(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return bytes(tensors.to_bytes(one)) == bytes(tensors.to_bytes(other))


def assert_same(got: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    assert got.keys() == state.keys()
    different = [fqn for fqn in state if not bit_equal(got[fqn], state[fqn])]
    assert not different


def newest_good(
    storage: Storage, load: Callable[[Manifest], Any], on_message: Callable[[str], None]
) -> tuple[Manifest, Any] | None:
    """The newest checkpoint that ``load`` can load, and what it returned; None when the storage holds none at all.

    It does in one process what ``training/snapshot.py`` does on several ranks together.

    Raises:
        CorruptCheckpoint: every checkpoint is corrupt.
        JobError: the newest readable one is of a newer format.
    """
    failure: CorruptCheckpoint | None = None
    for entry in catalogue(storage):
        if failure is not None:
            on_message(f"trying the older {storage}/{entry.folder}")
        try:
            manifest = open_manifest(storage, entry.step)
            return manifest, load(manifest)
        except CorruptCheckpoint as error:
            on_message(f"{storage}: {error}")
            failure = failure or error
    if failure is not None:
        raise failure
    return None


def newest(storage: Storage, messages: list[str] | None = None) -> tuple[int, State]:
    found = newest_good(storage, lambda manifest: read(storage, manifest), (messages or []).append)
    assert found is not None
    return found[0].step, found[1]


def shard_files(storage: Storage, step: int) -> list[Path]:
    return sorted((Path(str(storage)) / f"step-{step:08d}").glob("*.safetensors"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)
