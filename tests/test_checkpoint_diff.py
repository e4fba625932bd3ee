"""``dltrain checkpoint diff``: which tensors differ, and by how much."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command import dltrain
from dltrain.checkpoint import compare, tensors
from dltrain.checkpoint.blocks import blocks, ranges
from dltrain.core.storage import Storage

from .checkpoints import State, bit_equal, flip, grid, make_state, rows, save, shard_files, whole


def diff(one: object, other: object, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
    done = dltrain("checkpoint", "diff", str(one), str(other), "--json", *options)
    assert done.err == ""
    return done.code, {item.pop("name"): item for item in json.loads(done.out)}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Storage, Storage]:
    return Storage(str(tmp_path / "one")), Storage(str(tmp_path / "two"))


def test_the_same_tensors_are_alike_however_they_are_cut(two: tuple[Storage, Storage]) -> None:
    for cut in (grid, lambda state: rows(state, 3)):
        save(two[0], 1, rows(make_state(), 4))
        save(two[1], 1, cut(make_state()))
        assert diff(*two) == (0, {})
    assert dltrain("checkpoint", "diff", *map(str, two)).out == "all 9 tensors are alike\n"


def test_every_kind_of_difference_is_measured(two: tuple[Storage, Storage]) -> None:
    nan, inf = math.nan, math.inf
    one: State = {
        "a.same": torch.tensor([nan, 0.0, inf]),
        "b.values": torch.tensor([1.0, 2.0, 4.0, nan, nan]),
        "c.infinite": torch.tensor([inf, 1.0]),
        "d.dtype": torch.tensor([1.0, 2.0**-20]),
        "e.shape": torch.zeros(2, 3),
        "f.missing": torch.zeros(2),
        "h.half": torch.tensor([1.0, -3.0]).to(torch.bfloat16),
        "i.eight": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        "j.large": torch.tensor([2**60, 7]),
        "k.bool": torch.tensor([True, False]),
        "l.complex": torch.tensor([3 + 4j], dtype=torch.complex64),
    }
    other = one | {
        "a.same": torch.tensor([nan, -0.0, inf]),
        "b.values": torch.tensor([1.0, 2.5, 3.0, nan, 5.0]),
        "c.infinite": torch.tensor([inf, -inf]),
        "d.dtype": torch.tensor([1.0, 2.0**-20]).half(),
        "e.shape": torch.zeros(3, 2),
        "g.added": torch.zeros(4),
        "h.half": torch.tensor([1.0, -4.0]).to(torch.bfloat16),
        "i.eight": torch.tensor([1.0, 4.0]).to(torch.float8_e4m3fn),
        "j.large": torch.tensor([2**60 + 1, 7]),
        "k.bool": torch.tensor([True, True]),
        "l.complex": torch.tensor([0j], dtype=torch.complex64),
    }
    del other["f.missing"]
    save(two[0], 1, rows(one, 2))
    save(two[1], 1, whole(other, 1))
    code, found = diff(*two)
    assert code == 1
    keys = ("kind", "differing", "max_abs", "max_rel", "nans")
    assert {name: tuple(item[key] for key in keys) for name, item in found.items()} == {
        "b.values": ("values", 3, 1.0, 0.25, 1),
        "c.infinite": ("values", 1, "Infinity", "Infinity", 0),
        "d.dtype": ("dtype", 0, 0.0, 0.0, 0),
        "e.shape": ("shape", 0, 0.0, 0.0, 0),
        "f.missing": ("missing", 0, 0.0, 0.0, 0),
        "g.added": ("added", 0, 0.0, 0.0, 0),
        "h.half": ("values", 1, 1.0, 0.25, 0),
        "i.eight": ("values", 1, 2.0, 0.5, 0),
        "j.large": ("values", 1, 1.0, 2.0**-60, 0),
        "k.bool": ("values", 1, 1.0, 1.0, 0),
        "l.complex": ("values", 1, 5.0, 1.0, 0),
    }
    out = dltrain("checkpoint", "diff", *map(str, two)).out
    assert out.endswith("11 of 12 tensors differ\n")
    assert "1 NaN on one side" in out
    assert diff(*two, "--match", "a.*")[0] == 0


def test_steps_of_one_run_and_one_step_of_two_runs(two: tuple[Storage, Storage]) -> None:
    for storage in two:
        save(storage, 1, whole(make_state(1), 1))
    save(two[0], 2, whole(make_state(2), 1))
    assert diff(f"{two[0]}/step-00000001", two[0])[0] == 1
    assert diff(*two)[0] == 1
    assert diff(*two, "--step", "1") == (0, {})


def test_a_wrong_request_is_no_difference(two: tuple[Storage, Storage]) -> None:
    save(two[0], 1, whole(make_state(1), 1))
    save(two[1], 1, whole(make_state(2), 1))
    for options, said in [(["--step", "7"], "no step 7"), (["--match", "nothing*"], "no tensor is named like")]:
        done = dltrain("checkpoint", "diff", *map(str, two), *options)
        assert (done.code, said in done.err) == (2, True)
    flip(shard_files(two[1], 1)[0])
    done = dltrain("checkpoint", "diff", *map(str, two))
    assert done.code == 2
    assert "do not match their blake3" in done.err


def test_blocks_are_the_flat_tensor_and_read_each_piece_once(local: Storage) -> None:
    state = {"model.m.w": torch.arange(7000).reshape(70, 100), "model.m.v": torch.arange(6000).reshape(60, 20, 5)}
    state |= {"model.m.none": torch.empty(0, 5), "model.m.one": torch.tensor(3.0)}

    class Counting(Storage):
        count = 0

        def fill(self, name: str, begin: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
            self.count += sum(map(len, buffers))
            return super().fill(name, begin, buffers)

    for cut in (lambda s: rows(s, 4), grid, lambda s: whole(s, 1)):
        manifest = save(local, 1, cut(state))
        counting = Counting(str(local))
        for name, tensor in state.items():
            found = [
                tensors.from_array(block, manifest.tensors[name].dtype) for block in blocks(counting, manifest, name)
            ]
            assert bit_equal(torch.cat(found) if found else tensor.reshape(-1), tensor.reshape(-1))
            limit = 8000
            spans = list(ranges(manifest.tensors[name], limit))
            assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]
            assert spans == [] or (spans[0][0], spans[-1][1]) == (0, tensor.numel())
        assert counting.count == sum(tensor.nbytes for tensor in state.values())
    entry = save(local, 1, rows(state, 4)).tensors["model.m.w"]
    assert len(list(ranges(entry, 8000))) == 4


def test_values_are_those_of_torch() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    for code, dtype in tensors._DTYPES.items():
        bits = every if compare.ITEMSIZE[code] == 1 else torch.cat([every] * 8).view(torch.uint8)
        bits = bits % 2 if code == "BOOL" else bits
        array = bits.numpy().view(f"<u{compare.ITEMSIZE[code]}")
        want = bits.view(dtype)
        want = want.float() if want.is_floating_point() and code not in ("F64", "F32") else want
        got = torch.from_numpy(compare.values(array, code).copy())
        got = got.float() if code == "F16" else got
        assert torch.equal(got, want) or bit_equal(got, want), code
