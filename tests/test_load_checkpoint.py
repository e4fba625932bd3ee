"""``dltrain.load_checkpoint``: a mapping of whole tensors from anywhere, without Ray and without a process group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dltrain
import numpy as np
import pytest
import torch
from dltrain.core.storage import Storage

from .checkpoints import assert_same, flip, grid, make_state, rows, save, shard_files, whole

EMBED = "model.net.embed.weight"


def test_it_is_a_mapping_of_whole_tensors(storage: Storage) -> None:
    save(storage, 3, grid(make_state(3)))
    save(storage, 8, rows(make_state(8), 4))
    found = dltrain.load_checkpoint(str(storage))
    assert (found.step, found.job, found.manifest.cursor.samples, len(found)) == (8, {"name": "t"}, 512, 9)
    assert_same(dict(found), make_state(8))
    assert_same(dict(dltrain.load_checkpoint(str(storage), step=3)), make_state(3))
    assert_same(dict(dltrain.load_checkpoint(f"{storage}/step-00000003")), make_state(3))
    assert EMBED in found
    assert "model.net.gone" not in found
    with pytest.raises(KeyError, match=r"model\.net\.gone"):
        found["model.net.gone"]
    with pytest.raises(dltrain.JobError, match=r"no step 4.*did you mean 3"):
        dltrain.load_checkpoint(str(storage), 4)


@pytest.mark.parametrize(
    "index",
    [
        (),
        (slice(3, 9),),
        (slice(None, None, 5), slice(2, -1)),
        (..., 4),
        (-1, ...),
        (7, slice(8, 2)),
        (slice(100, 200),),
        tuple(np.s_[4:6, ::3]),
    ],
)
def test_slices_are_those_of_torch(local: Storage, index: tuple[int | slice, ...]) -> None:
    save(local, 1, grid(make_state()))
    found = dltrain.load_checkpoint(Path(str(local)))
    want = make_state()[EMBED][index]
    assert torch.equal(found.slice(EMBED, *index), want)
    assert found.slice("optimizer.net.embed.weight.step").shape == ()


def test_an_index_that_does_not_fit_is_refused(local: Storage) -> None:
    save(local, 1, grid(make_state()))
    found = dltrain.load_checkpoint(str(local))
    for index in [(24,), (0, 0, 0), (..., ...), (slice(5, 1, -1),)]:
        with pytest.raises(IndexError):
            found.slice(EMBED, *index)
    with pytest.raises(KeyError):
        found.slice("model.net.gone", 1)


def test_weights_have_the_names_of_the_module(local: Storage) -> None:
    save(local, 1, whole({"model.m.weight": torch.ones(2, 3), "model.m.bias": torch.zeros(2)}, 1))
    model = torch.nn.Linear(3, 2)
    model.load_state_dict(dltrain.load_checkpoint(str(local)).weights())
    assert torch.equal(model.weight, torch.ones(2, 3))
    with pytest.raises(dltrain.JobError, match="no averaged weights"):
        dltrain.load_checkpoint(str(local)).weights(ema=True)


def test_what_is_read_is_verified(local: Storage) -> None:
    save(local, 1, rows(make_state(), 2))
    found = dltrain.load_checkpoint(str(local))
    flip(shard_files(local, 1)[0])
    wrong = []
    for name in found:
        try:
            found[name]
        except dltrain.RunFailed as error:
            wrong.append((name, "blake3" in str(error)))
    assert len(wrong) == 1
    assert wrong[0][1]


def test_it_takes_neither_ray_nor_a_process_group(local: Storage) -> None:
    save(local, 1, rows(make_state(), 2))
    program = f"""
import sys, dltrain
found = dltrain.load_checkpoint({str(local)!r})
assert not {{"torch", "ray"}} & set(sys.modules), "nothing is read yet"
assert found[{EMBED!r}].shape == (24, 10)
import torch
assert not torch.distributed.is_initialized()
assert not {{"ray", "deepspeed", "wandb", "dltrain.launcher", "dltrain.training"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
