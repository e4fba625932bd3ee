"""How many bytes a load reads, counted where the filesystem hands them out, against how many its layout needs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from dltrain.checkpoint.reader import open_manifest, read
from dltrain.core.contracts import Shard
from dltrain.core.storage import Storage
from fsspec.implementations.local import LocalFileSystem

from .checkpoints import State, assert_same, grid, rows, save, whole

Cut = Callable[[State], list[dict[str, Shard]]]


LOCK = threading.Lock()  # several reads are made at a time


class CountedFileSystem(LocalFileSystem):
    """Local files behind ``counted://``; ``handed_out`` is what all reads of shards returned, in bytes."""

    protocol = "counted"
    handed_out = 0

    @classmethod
    def _strip_protocol(cls, path: Any, *args: Any, **options: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("counted://"), *args, **options)

    def cat_file(self, path: Any, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        data = super().cat_file(path, start, end, **options)
        if str(path).endswith(".safetensors"):
            with LOCK:
                CountedFileSystem.handed_out += len(data)
        return data


@pytest.fixture
def counted(tmp_path: Path) -> str:
    """A URL whose reads are counted from 0."""
    fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
    CountedFileSystem.handed_out = 0
    return f"counted://{tmp_path}/run"


def amplification(url: str, state: State, layout: list[dict[str, Shard]]) -> float:
    """Load every rank's slices of ``layout``: the bytes read over the bytes needed."""
    storage = Storage(url)
    manifest = open_manifest(storage, 1)
    needed = 0
    for shards in layout:
        wanted = {fqn: (shard.offset, tuple(shard.data.shape)) for fqn, shard in shards.items()}
        assert_same(read(storage, manifest, wanted), {fqn: shard.data for fqn, shard in shards.items()})
        needed += sum(math.prod(shape) * state[fqn].element_size() for fqn, (_, shape) in wanted.items())
    return CountedFileSystem.handed_out / needed


def small() -> State:
    return {
        "model.m.up": torch.randn(512, 128),
        "model.m.down": torch.randn(128, 512),
        "model.m.norm": torch.randn(512),
        "optimizer.m.up.exp_avg": torch.randn(512, 128),
        "optimizer.m.up.step": torch.tensor(1.0),
    }


CUTS: dict[str, Cut] = {
    "ddp 1": lambda state: whole(state, 1),
    "ddp 4": lambda state: whole(state, 4),
    "rows 2": lambda state: rows(state, 2),
    "rows 3": lambda state: rows(state, 3),
    "rows 4": lambda state: rows(state, 4),
    "rows 8": lambda state: rows(state, 8),
    "grid 4": grid,
}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        *((saved, "ddp 1") for saved in CUTS),
        *(("rows 8", loaded) for loaded in ("ddp 4", "rows 2", "rows 4", "rows 8")),
        *(("grid 4", loaded) for loaded in ("ddp 4", "grid 4")),
    ],
)
def test_what_was_cut_finer_is_read_once(counted: str, saved: str, loaded: str) -> None:
    state = small()
    save(Storage(counted), 1, CUTS[saved](state))
    assert 1 <= amplification(counted, state, CUTS[loaded](state)) <= 1.05


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("ddp 1", "rows 2"), ("ddp 1", "rows 3"), ("ddp 1", "rows 8"), ("rows 2", "rows 4"), ("rows 3", "rows 8")],
)
@pytest.mark.parametrize("megabytes", [32, 128])
def test_each_of_more_ranks_reads_its_slice(counted: str, saved: str, loaded: str, megabytes: int) -> None:
    state: State = {"model.m.matrix": torch.arange(megabytes << 18, dtype=torch.int32).reshape(-1, 256)}
    save(Storage(counted), 1, CUTS[saved](state))
    assert 1 <= amplification(counted, state, CUTS[loaded](state)) <= 1.05
