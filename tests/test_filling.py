"""Filling shards in place: whatever way they are cut, laid out or shared, and from checkpoints of older formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dltrain.checkpoint.manifest import CorruptCheckpoint, folder_name
from dltrain.checkpoint.reader import open_manifest, read
from dltrain.checkpoint.verify import verify
from dltrain.core.contracts import Shard
from dltrain.core.storage import Storage
from dltrain.training.filling import fill_all

from .checkpoints import State, assert_same, bit_equal, flip, grid, make_state, rows, save, shard_files, whole

Cut = Callable[[State], list[dict[str, Shard]]]


def as_older(storage: Storage, step: int, version: int) -> None:
    """Rewrite a checkpoint's manifest as dltrain wrote it before: every block a piece, and SHA-256 in format 1."""
    name = f"{folder_name(step)}/manifest.json"
    manifest, document = open_manifest(storage, step), json.loads(storage.read(name))
    document["format"] = version
    for fqn, entry in document["tensors"].items():
        entry["pieces"] = [block._asdict() for block in manifest.tensors[fqn].blocks()]
        for piece in entry["pieces"] if version == 1 else ():
            data = storage.read_range(f"{folder_name(step)}/{piece['file']}", piece["begin"], piece["end"])
            del piece["hash"]
            piece["sha256"] = hashlib.sha256(data).hexdigest()
    storage.write(name, [json.dumps(document).encode()])


@pytest.mark.parametrize("saved", [lambda s: rows(s, 3), lambda s: whole(s, 2), grid])
@pytest.mark.parametrize("loaded", [lambda s: rows(s, 2), lambda s: whole(s, 1), grid])
def test_every_layout_is_filled_from_every_other(local: Storage, saved: Cut, loaded: Cut) -> None:
    manifest = save(local, 1, saved(make_state(1)))
    empty = {name: torch.zeros_like(tensor) for name, tensor in make_state(1).items()}
    for shards in loaded(empty):  # views of the tensors: columns lie in many runs, the turned matrix in none
        fill_all(local, manifest, shards)
    assert_same(empty, make_state(1))


def test_memory_of_two_names_is_read_into_by_one(local: Storage) -> None:
    first, second = torch.randn(4000, 300), torch.randn(4000, 300)
    manifest = save(local, 1, whole({"model.m.a": first, "model.m.b": second}, 1))
    shared = torch.zeros(4000, 300)
    for _ in range(5):
        fill_all(local, manifest, whole({"model.m.a": shared, "model.m.b": shared}, 1)[0])
        assert torch.equal(shared, second)


def test_another_dtype_is_converted(local: Storage) -> None:
    manifest = save(local, 1, whole({"model.m.a": torch.tensor([1.5, -2.0]).to(torch.bfloat16)}, 1))
    target = torch.zeros(2)
    fill_all(local, manifest, whole({"model.m.a": target}, 1)[0])
    assert target.tolist() == [1.5, -2.0]


def test_a_damaged_piece_fails_the_fill(local: Storage) -> None:
    manifest = save(local, 1, whole({"model.m.a": torch.randn(4000, 300)}, 1))
    flip(shard_files(local, 1)[0])
    with pytest.raises(CorruptCheckpoint, match="do not match their blake3"):
        fill_all(local, manifest, whole({"model.m.a": torch.zeros(4000, 300)}, 1)[0])


def test_a_checkpoint_of_format_1_is_read_and_verified_by_its_sha256(local: Storage, tmp_path: Path) -> None:
    state = make_state(3)
    save(local, 1, rows(state, 2))
    as_older(local, 1, 1)
    manifest = open_manifest(local, 1)
    assert {piece.hash[:7] for entry in manifest.tensors.values() for piece in entry.pieces} == {"sha256:"}
    assert_same(read(local, manifest), state)
    assert list(verify(local, 1)) == []
    flip(shard_files(local, 1)[0])
    assert [damage.why for damage in verify(local, 1)] == ["not the bytes that were written (sha256)"]
    with pytest.raises(CorruptCheckpoint, match="do not match their sha256"):
        read(local, manifest)


def test_a_checkpoint_of_format_2_is_what_it_was(local: Storage) -> None:
    state = {"model.m.large": torch.randn(3000, 100)}
    now = save(local, 1, rows(state, 2))
    assert len(now.tensors["model.m.large"].pieces) == 2
    as_older(local, 1, 2)
    before = open_manifest(local, 1)
    assert len(before.tensors["model.m.large"].pieces) == 6
    assert [*before.tensors["model.m.large"].blocks()] == [*now.tensors["model.m.large"].blocks()]
    assert_same(read(local, before), state)
    assert list(verify(local, 1)) == []
    flip(shard_files(local, 1)[0])
    assert [damage.tensor for damage in verify(local, 1)] == ["model.m.large"]


@pytest.mark.parametrize("change", [("sha256", "0" * 63), ("surprise", 1)])
def test_a_damaged_manifest_of_format_1_is_refused(local: Storage, change: tuple[str, object]) -> None:
    save(local, 1, whole(make_state(), 1))
    as_older(local, 1, 1)
    document = json.loads(local.read("step-00000001/manifest.json"))
    document["tensors"]["model.net.head.weight"]["pieces"][0][change[0]] = change[1]
    local.write("step-00000001/manifest.json", [json.dumps(document).encode()])
    with pytest.raises(CorruptCheckpoint, match=r"model\.net\.head\.weight"):
        open_manifest(local, 1)


def test_a_tensor_on_no_cpu_is_copied_to(local: Storage) -> None:
    """No GPU is needed: a conjugated view cannot be read into either."""
    value = torch.randn(5, dtype=torch.complex64)
    manifest = save(local, 1, whole({"model.m.c": value}, 1))
    memory = torch.zeros(5, dtype=torch.complex64)
    fill_all(local, manifest, whole({"model.m.c": memory.conj()}, 1)[0])
    assert bit_equal(memory.conj().resolve_conj(), value)
