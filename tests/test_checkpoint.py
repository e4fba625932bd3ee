"""Checkpoints: any slices in, any slices out, bit-equal; who writes what; export."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from dltrain.checkpoint import tensors
from dltrain.checkpoint.export import export_weights
from dltrain.checkpoint.manifest import CorruptCheckpoint
from dltrain.checkpoint.reader import open_manifest, read, read_arrays
from dltrain.checkpoint.writer import (
    PieceKey,
    assign,
    held,
    write_shard,
)
from dltrain.core.contracts import Shard
from dltrain.core.errors import JobError
from dltrain.core.storage import Storage
from dltrain.core.tensorfile import ITEMSIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from .checkpoints import (
    State,
    assert_same,
    bit_equal,
    flip,
    grid,
    make_state,
    rows,
    save,
    shard_files,
    whole,
)


@pytest.mark.parametrize("cut", [lambda s: whole(s, 1), lambda s: whole(s, 4), lambda s: rows(s, 4), grid])
def test_any_layout_is_read_whole_and_in_any_other(
    storage: Storage, cut: Callable[[State], list[dict[str, Shard]]]
) -> None:
    state = make_state()
    save(storage, 3, cut(state))
    manifest = open_manifest(storage, 3)
    assert_same(read(storage, manifest), state)
    for other in (rows(state, 3), grid(state)):
        for shards in other:
            wanted = {fqn: (shard.offset, tuple(shard.data.shape)) for fqn, shard in shards.items()}
            got = read(storage, manifest, wanted)
            assert_same(got, {fqn: shard.data for fqn, shard in shards.items()})


def test_what_is_read_is_the_callers_own(local: Storage) -> None:
    save(local, 1, whole(make_state(), 1))
    one = read(local, open_manifest(local, 1))
    other = read(local, open_manifest(local, 1))
    for tensor in one.values():
        tensor.zero_()
    assert_same(other, make_state())


def test_every_dtype_that_the_format_has(local: Storage) -> None:
    state = {}
    for dtype in tensors._CODES:
        bits = torch.randint(0, 256, (6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        full = (bits % 2).bool() if dtype is torch.bool else bits.reshape(-1).view(dtype)
        full = full.reshape(-1, 2)
        state |= {f"model.m.{dtype}.{kind}": t for kind, t in (("2d", full), ("turned", full.t()), ("0d", full[0, 0]))}
    assert len(state) >= 3 * 19
    save(local, 1, rows(state, 2))
    assert_same(read(local, open_manifest(local, 1)), state)


def test_a_conjugate_view_is_stored_as_its_values(local: Storage) -> None:
    value = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    save(local, 1, whole({"model.m.a": value.conj(), "model.m.b": value.conj().imag}, 1))
    got = read(local, open_manifest(local, 1))
    assert torch.equal(got["model.m.a"], value.conj().clone())
    assert torch.equal(got["model.m.b"], value.conj().imag.clone())


def test_a_dtype_that_cannot_be_stored_is_named() -> None:
    with pytest.raises(TypeError, match=r"model\.m\.w: .*complex128"):
        held(whole({"model.m.w": torch.zeros(2, dtype=torch.complex128)}, 1)[0])


def test_shards_are_safetensors_files(local: Storage) -> None:
    state = make_state()
    manifest = save(local, 1, rows(state, 4))
    found: State = {}
    for rank in range(4):
        path = Path(str(local)) / "step-00000001" / f"shard-{rank:05d}-of-00004.safetensors"
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            assert file.metadata() == {"format": "pt"}
    assert torch.equal(found["model.net.embed.weight[6:12,0:10]"], state["model.net.embed.weight"][6:12])
    assert bit_equal(found["model.net.tracked"], state["model.net.tracked"])
    for entry in manifest.tensors.values():
        assert all(piece.begin % ITEMSIZE[entry.dtype] == 0 for piece in entry.pieces)  # so that they can be mapped
    assert {p.file for t in manifest.tensors.values() for p in t.pieces} == {
        f"shard-{rank:05d}-of-00004.safetensors" for rank in range(4)
    }


def test_large_tensors_are_hashed_in_pieces_so_that_a_slice_reads_little(local: Storage) -> None:
    big = torch.arange(12_000_000, dtype=torch.float32).reshape(6000, 2000)
    long = torch.arange(10_000_000, dtype=torch.int32).reshape(1, 1, -1)
    manifest = save(local, 1, whole({"model.m.big": big, "model.m.long": long}, 1))
    for entry in manifest.tensors.values():
        assert max(block.end - block.begin for block in entry.blocks()) <= 8 << 20

    class Counting(Storage):
        count = 0

        def fill(self, name: str, begin: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
            self.count += sum(map(len, buffers))
            return super().fill(name, begin, buffers)

    counting = Counting(str(local))
    got = read(counting, manifest, {"model.m.big": ((3000, 5), (10, 1990))})
    assert torch.equal(got["model.m.big"], big[3000:3010, 5:1995])
    assert counting.count <= 8 << 20
    assert_same(read(local, manifest), {"model.m.big": big, "model.m.long": long})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_slice_of_any_tiling(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    cuts = [sorted({0, size, *data.draw(st.sets(st.integers(0, size), max_size=2))}) for size in shape]
    full = torch.arange(math.prod(shape), dtype=torch.int16).reshape(shape)
    boxes = list(product(*(list(pairwise(cut)) for cut in cuts)))
    ranks = [
        {"model.m.x": Shard(shape, tuple(lo for lo, _ in box), full[tuple(slice(*edge) for edge in box)])}
        for box in boxes
    ]
    begin = [data.draw(st.integers(0, size)) for size in shape]
    extent = [data.draw(st.integers(0, size - lo)) for size, lo in zip(shape, begin, strict=True)]
    storage = Storage(str(tmp_path_factory.mktemp("tiling")))
    manifest = save(storage, 1, ranks)
    got = read(storage, manifest, {"model.m.x": (tuple(begin), tuple(extent))})["model.m.x"]
    want = full[tuple(slice(lo, lo + n) for lo, n in zip(begin, extent, strict=True))]
    assert torch.equal(got, want)


def test_the_manifest_comes_back_as_it_was(local: Storage) -> None:
    values = {"lr": 0.1 + 0.2, "best": math.inf, "mean": [1.5, -0.0], "seed": 2**62, "text": "ü\n", "none": None}
    manifest = save(local, 7, whole(make_state(), 2), **values)
    again = open_manifest(local, 7)
    assert again == manifest
    assert again.extra == values
    assert (again.cursor.step, again.cursor.samples, again.world) == (7, 448, 2)


def test_wrong_questions(local: Storage) -> None:
    manifest = save(local, 1, whole(make_state(), 1))
    with pytest.raises(KeyError, match=r"step-00000001 has no tensor model\.net\.gone"):
        read(local, manifest, {"model.net.gone": ((0,), (1,))})
    for offset, shape in [((20, 0), (5, 10)), ((-1, 0), (1, 1)), ((0,), (1,)), ((0, 0), (1, -1))]:
        with pytest.raises(ValueError, match="leaves the tensor"):
            read(local, manifest, {"model.net.embed.weight": (offset, shape)})
    key = PieceKey("model.net.norm.weight", (1,), (6,), "BF16", 12)
    with pytest.raises(ValueError, match="does not hold"):
        write_shard(local, 2, 0, 1, whole(make_state(), 1)[0], [key])
    with pytest.raises(ValueError, match="elements"):
        save(local, 2, rows(make_state(), 4)[:3])


@given(st.lists(st.lists(st.integers(0, 30), max_size=25), min_size=1, max_size=9))
def test_every_piece_is_written_once_by_a_holder(holdings: list[list[int]]) -> None:
    keys = [[PieceKey(f"t{i}", (0,), (i,), "U8", i) for i in rank] for rank in holdings]
    chosen = assign(keys)
    assert assign(keys) == chosen
    written = [key for rank in chosen for key in rank]
    assert sorted(written) == sorted({key for rank in keys for key in rank})
    assert all(set(mine) <= set(all_of_it) for mine, all_of_it in zip(chosen, keys, strict=True))


def test_replicas_share_the_bytes() -> None:
    keys = [PieceKey(f"t{i}", (0,), (i,), "U8", i * 1000) for i in range(1, 41)]
    loads = [sum(key.nbytes for key in mine) for mine in assign([keys] * 4)]
    assert max(loads) - min(loads) <= 1000
    alone = PieceKey("alone", (0,), (9,), "U8", 500_000)
    loads = [sum(key.nbytes for key in mine) for mine in assign([[*keys, alone], keys, keys])]
    assert loads[0] == 500_000


def test_export_is_plain_safetensors(storage: Storage, tmp_path: Path) -> None:
    state = make_state()
    manifest = save(storage, 1, rows(state, 4))
    path = tmp_path / "out" / "model.safetensors"
    digest = export_weights(storage, manifest, path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    weights = {fqn.removeprefix("model.net."): t for fqn, t in state.items() if fqn.startswith("model.")}
    assert_same(load_file(path), weights)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]


def test_export_of_several_parts_keeps_their_names(local: Storage, tmp_path: Path) -> None:
    state = {"model.g.w": torch.ones(2), "model.d.w": torch.zeros(2), "optimizer.g.w.exp_avg": torch.ones(2)}
    manifest = save(local, 1, whole(state, 1))
    export_weights(local, manifest, tmp_path / "gan.safetensors")
    assert_same(load_file(tmp_path / "gan.safetensors"), {"g.w": torch.ones(2), "d.w": torch.zeros(2)})


def test_export_of_a_corrupt_checkpoint_leaves_the_file_that_was_there(local: Storage, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the last one")
    manifest = save(local, 1, whole({f"model.m.{i}": torch.full((100,), float(i)) for i in range(9)}, 1))
    flip(shard_files(local, 1)[0])
    with pytest.raises(CorruptCheckpoint):
        export_weights(local, manifest, path)
    assert path.read_bytes() == b"the last one"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.safetensors", "run"]
    with pytest.raises(JobError, match=r"no tensor under 'model\.'"):
        export_weights(local, save(local, 2, whole({"optimizer.x": torch.ones(1)}, 1)), path)


def test_listing_and_exporting_need_no_torch(local: Storage, tmp_path: Path) -> None:
    save(local, 4, rows(make_state(), 2))
    program = """
import sys
from pathlib import Path
from dltrain.checkpoint import export, manifest, reader, retention, writer
from dltrain.core.storage import Storage
storage = Storage(sys.argv[1])
(entry,) = reader.catalogue(storage)
export.export_weights(storage, reader.open_manifest(storage, entry.step), Path(sys.argv[2]))
retention.prune(storage, 1)
heavy = {"torch", "ray", "fsspec", "s3fs", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    command = [sys.executable, "-c", program, str(local), str(tmp_path / "w.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(load_file(tmp_path / "w.safetensors")) >= {"embed.weight", "head.weight"}


def test_bit_patterns_without_torch(local: Storage) -> None:
    state = {"model.m.w": torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16)}
    arrays = read_arrays(local, save(local, 1, whole(state, 1)))
    assert arrays["model.m.w"].dtype == np.dtype("uint16")
    assert arrays["model.m.w"].tolist() == [0x3F80, 0xC000, 0x3F00]
