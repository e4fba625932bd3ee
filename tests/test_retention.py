"""Which checkpoints are there, which stay, and which are replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dltrain.checkpoint.manifest import folder_step
from dltrain.checkpoint.reader import catalogue
from dltrain.checkpoint.retention import prune, set_aside
from dltrain.checkpoint.writer import (
    assign,
    held,
    write_shard,
)
from dltrain.core.storage import Storage

from .checkpoints import (
    assert_same,
    make_state,
    newest,
    rows,
    save,
    whole,
)


def test_the_newest_stay(storage: Storage) -> None:
    tiny = whole({"model.m.w": torch.ones(3)}, 1)
    assert prune(storage, 1) == []
    for step in (5, 10, 99_999_999, 100_000_000):
        save(storage, step, tiny)
    storage.write("step-00000007/shard-00000-of-00001.safetensors", [b"half"])
    storage.write("step-100000001/shard-00000-of-00001.safetensors", [b"in progress"])
    storage.write("notes/read.me", [b"mine"])
    storage.write("step-0000000000000001/x", [b"not ours"])
    assert [entry.step for entry in catalogue(storage)] == [100_000_000, 99_999_999, 10, 5]
    assert prune(storage, 3) == [7, 5]
    assert prune(storage, 3) == []
    assert prune(storage, 1) == [99_999_999, 10]
    assert prune(storage, 1) == []
    assert storage.folders() == ["notes", "step-0000000000000001", "step-100000000", "step-100000001"]
    assert_same(newest(storage)[1], {"model.m.w": torch.ones(3)})
    with pytest.raises(ValueError, match="at least one"):
        prune(storage, 0)


def test_a_killed_removal_leaves_no_checkpoint_behind(local: Storage) -> None:
    class Dies(Storage):
        def remove_tree(self, name: str) -> None:
            raise KeyboardInterrupt

    for step in (1, 2):
        save(local, step, whole(make_state(), 1))
    with pytest.raises(KeyboardInterrupt):
        prune(Dies(str(local)), 1)
    assert [entry.step for entry in catalogue(local)] == [2]
    assert prune(local, 1) == [1]


def test_after_falling_back_the_corrupt_one_is_neither_loaded_nor_kept(storage: Storage) -> None:
    tiny = whole({"model.m.w": torch.ones(3)}, 1)
    for step in (100, 200, 300):
        save(storage, step, tiny)
    assert set_aside(storage, after=100) == [300, 200]
    assert [entry.step for entry in catalogue(storage)] == [100]
    assert prune(storage, 1) == []
    save(storage, 250, tiny)
    assert prune(storage, 1) == [200, 100]
    assert [entry.step for entry in catalogue(storage)] == [250]
    save(storage, 350, tiny)
    assert prune(storage, 1) == [300, 250]
    assert storage.folders() == ["step-00000350"]


@pytest.mark.parametrize(
    ("name", "step"),
    [("step-00000012", 12), ("step-123456789", 123456789), ("step-000000012", None), ("step-12", None), ("x", None)],
)
def test_folder_names(name: str, step: int | None) -> None:
    assert folder_step(name) == step


def test_saving_a_step_again_replaces_it(local: Storage) -> None:
    save(local, 1, whole(make_state(1), 1))
    save(local, 2, whole(make_state(2), 4))
    shares = assign([held(shards) for shards in rows(make_state(3), 4)])
    write_shard(local, 2, 0, 4, rows(make_state(3), 4)[0], shares[0])
    assert [entry.step for entry in catalogue(local)] == [1]  # a manifest goes before the bytes that it names
    save(local, 2, rows(make_state(3), 2))
    step, state = newest(local)
    assert step == 2
    assert_same(state, make_state(3))


def test_a_checkpoint_is_listed_only_when_it_is_complete(local: Storage) -> None:
    """A catalogue taken at any chunk of a save shows the checkpoint only when it is complete."""
    seen: list[list[int]] = []

    class Watched(Storage):
        def write(self, name: str, chunks: Any) -> None:
            super().write(name, (seen.append([e.step for e in catalogue(local)]) or chunk for chunk in chunks))

    save(Watched(str(local)), 1, rows(make_state(), 4))
    assert len(seen) > 20
    assert not any(seen)  # not even while the manifest is being written
    assert [entry.step for entry in catalogue(local)] == [1]
