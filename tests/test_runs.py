"""Runs of a flattened tensor as boxes of the tensor."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from dltrain.checkpoint.reader import open_manifest, read
from dltrain.core.contracts import Run
from dltrain.core.runs import boxes_of_run
from dltrain.core.storage import Storage
from dltrain.training.filling import fill_all
from hypothesis import given
from hypothesis import strategies as st

from .checkpoints import save

SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_the_boxes_of_a_run_are_its_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = torch.arange(prod(shape)).reshape(shape)
    stop = data.draw(st.integers(0, prod(shape)))
    start = data.draw(st.integers(0, stop))
    found: list[int] = []
    boxes = list(boxes_of_run(shape, start, stop))
    for offset, extents in boxes:
        place = tuple(slice(begin, begin + extent) for begin, extent in zip(offset, extents, strict=True))
        found += whole[place].flatten().tolist()
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_runs_of_several_ranks_make_a_checkpoint(local: Storage) -> None:
    state = {"model.m.a": torch.randn(7, 3, 2), "model.m.b": torch.randn(11), "model.m.c": torch.tensor(3.0)}

    def cut(rank: int) -> dict[str, Run]:
        places = {name: (t.numel() * rank // 4, t.numel() * (rank + 1) // 4) for name, t in state.items()}
        return {
            name: Run(tuple(t.shape), a, t.flatten()[a:b].clone())
            for name, t in state.items()
            for a, b in [places[name]]
        }

    save(local, 1, [cut(rank) for rank in range(4)])
    manifest = open_manifest(local, 1)
    for name, tensor in read(local, manifest).items():
        assert torch.equal(tensor, state[name])
    for rank in range(4):
        runs, expected = cut(rank), cut(rank)
        for run in runs.values():
            run.data.zero_()
        fill_all(local, manifest, runs)
        assert all(torch.equal(run.data, expected[name].data) for name, run in runs.items())
    assert len(list(Path(str(local)).glob("*/shard-*"))) == 4
