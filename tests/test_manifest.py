"""Manifests from a hostile hand, or from a newer version, are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from dltrain.checkpoint.manifest import CorruptCheckpoint, parse
from dltrain.checkpoint.reader import open_manifest, read
from dltrain.checkpoint.writer import (
    make_manifest,
)
from dltrain.core.errors import JobError
from dltrain.core.storage import Storage

from .checkpoints import (
    make_state,
    newest_good,
    rows,
    save,
    whole,
)


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def change(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Set ``a.b.0.c`` in a nested document; ``DELETE`` removes it."""

    def apply(document: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        place: Any = document
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place[key]
        key: Any = int(last) if isinstance(place, list) else last
        if value is DELETE:
            del place[key]
        else:
            place[key] = value

    return apply


DELETE = object()
PIECE = "tensors/model.net.embed.weight/pieces/0"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("surprise", 1, "surprise"),
        ("format", "1", "format"),
        ("format", 0, "format"),
        ("step", 6, "manifest of step 6"),
        ("step", True, "step"),
        ("world", 0, "world"),
        ("cursor", DELETE, "cursor"),
        ("cursor/samples", -1, "samples"),
        ("tensors/model.net.embed.weight/dtype", "F128", "unknown dtype"),
        ("tensors/model.net.embed.weight/shape", [24, 11], "elements"),
        ("tensors/model.net.embed.weight/shape", [2**62, 2**62], "elements"),
        ("tensors/model.net.embed.weight/shape/0", 2**64, "shape"),
        ("tensors/model.net.embed.weight/pieces", [], "elements"),
        (f"{PIECE}/more", 1, "more"),
        (f"{PIECE}/file", "../shard.safetensors", "file"),
        (f"{PIECE}/file", "/etc/x.safetensors", "file"),
        (f"{PIECE}/file", "a/b.safetensors", "file"),
        (f"{PIECE}/file", "manifest.json", "file"),
        (f"{PIECE}/file", "shard.safetensors\n", "file"),
        (f"{PIECE}/offset", [1, 0], "overlap"),
        (f"{PIECE}/offset", [-1, 0], "offset"),
        (f"{PIECE}/offset", [0], "axes"),
        (f"{PIECE}/offset", [19, 0], "leaves the tensor"),
        (f"{PIECE}/shape", [5, 10], "bytes for a piece"),
        (f"{PIECE}/end", 10**9, "bytes for a piece"),
        (f"{PIECE}/hash", "blake3:" + "0" * 63, "hash"),
        (f"{PIECE}/hash", "blake3:" + "G" * 64, "hash"),
        (f"{PIECE}/hash", "md5:" + "0" * 64, "hash"),
        (f"{PIECE}/hash", "0" * 64, "hash"),
        (f"{PIECE}/hash", "blake3:" + "0" * 128, "not as many hashes"),
        (f"{PIECE}/block", 100, "not as many hashes"),
        (f"{PIECE}/block", -1, "block"),
    ],
)
def test_a_hostile_manifest_is_refused(local: Storage, path: str, value: object, said: str) -> None:
    save(local, 5, rows(make_state(), 4))
    document = json.loads(local.read("step-00000005/manifest.json"))
    change(path, value)(document)
    local.write("step-00000005/manifest.json", [json.dumps(document).encode()])
    with pytest.raises(CorruptCheckpoint) as caught:
        open_manifest(local, 5)
    assert said in str(caught.value)
    if path.startswith("tensors"):
        assert caught.value.tensor == "model.net.embed.weight"


def test_a_manifest_may_not_use_bytes_twice(local: Storage) -> None:
    save(local, 5, whole(make_state(), 1))
    document = json.loads(local.read("step-00000005/manifest.json"))
    tensors_ = document["tensors"]
    tensors_["model.net.head.weight"]["pieces"] = tensors_["model.net.embed.weight"]["pieces"]
    with pytest.raises(CorruptCheckpoint, match="share bytes"):
        parse(json.dumps(document).encode(), step=5, where="here")


def test_a_manifest_that_promises_much_takes_no_memory(local: Storage) -> None:
    save(local, 5, whole({"model.m.w": torch.zeros(4)}, 1))
    document = json.loads(local.read("step-00000005/manifest.json"))
    entry = document["tensors"]["model.m.w"]
    entry["shape"] = entry["pieces"][0]["shape"] = [2**50]
    entry["pieces"][0] |= {"end": entry["pieces"][0]["begin"] + 2**52, "block": 0}
    local.write("step-00000005/manifest.json", [json.dumps(document).encode()])
    with pytest.raises(CorruptCheckpoint, match="cut short"):
        read(local, open_manifest(local, 5))


def test_many_pieces_are_checked_quickly() -> None:
    digest = f"blake3:{0:064}"

    def pieces(count: int) -> list[dict[str, Any]]:
        boxes = product(range(count), range(count))
        return [
            {"file": "s.safetensors", "offset": [i, j], "shape": [1, 1], "begin": n, "end": n + 1, "hash": digest}
            for n, (i, j) in enumerate(boxes)
        ]

    base = json.loads(make_manifest([], step=1, total_steps=1, samples=0, world=1, job={}).model_dump_json())
    base["tensors"]["w"] = {"shape": [100, 100], "dtype": "U8", "pieces": pieces(100)}
    parse(json.dumps(base).encode(), step=1, where="here")
    base["tensors"]["w"]["pieces"][77]["offset"] = [50, 50]
    with pytest.raises(CorruptCheckpoint, match="overlap"):
        parse(json.dumps(base).encode(), step=1, where="here")


def test_a_manifest_that_is_too_deep_is_refused(local: Storage) -> None:
    save(local, 5, whole(make_state(), 1))
    document = json.loads(local.read("step-00000005/manifest.json"))
    for version in (1, 3):
        text = json.dumps(document | {"format": version, "extra": {"deep": "HERE"}})
        for depth in range(256, sys.getrecursionlimit() + 10):  # what can be read need not be fit to be written
            with pytest.raises(CorruptCheckpoint):
                parse(text.replace('"HERE"', "[" * depth + "]" * depth).encode(), step=5, where="here")


def test_a_newer_format_is_refused_with_the_version_named_and_no_older_one_taken(local: Storage) -> None:
    save(local, 5, whole(make_state(), 1))
    document = json.loads(local.read("step-00000005/manifest.json"))
    document |= {"format": 4, "dltrain": "9.1", "unknown": {}}
    local.write("step-00000006/manifest.json", [json.dumps(document).encode()])
    with pytest.raises(JobError, match=r"format 4, written by dltrain '9\.1'.* up to format 3.*newer dltrain"):
        newest_good(local, lambda manifest: read(local, manifest), print)
