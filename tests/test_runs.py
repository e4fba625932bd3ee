"""Runs of a flattened tensor as boxes of the tensor."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from dltrain.checkpoint.reader import open_manifest, read
from dltrain.core.contracts import Run
from dltrain.core.runs import box_around_run, boxes_of_run
from dltrain.core.storage import Storage
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


@given(SHAPES, st.data())
def test_a_run_is_found_again_in_the_box_around_it(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = torch.arange(prod(shape)).reshape(shape)
    stop = data.draw(st.integers(0, prod(shape)))
    start = data.draw(st.integers(0, stop))
    run = Run(shape, start, whole.flatten()[start:stop].clone())
    offset, extents = run.bounds()
    assert (offset, extents) == box_around_run(shape, start, stop)
    place = tuple(slice(begin, begin + extent) for begin, extent in zip(offset, extents, strict=True))
    run.data.zero_()
    run.take(whole[place])
    assert run.data.tolist() == list(range(start, stop))


def test_a_box_is_no_larger_than_the_rows_that_a_run_touches() -> None:
    assert box_around_run((8, 3, 5), 16, 44) == ((1, 0, 0), (2, 3, 5))
    assert box_around_run((8, 3, 5), 16, 29) == ((1, 0, 0), (1, 3, 5))
    assert box_around_run((8, 3, 5), 16, 19) == ((1, 0, 1), (1, 1, 3))
    assert box_around_run((8, 3, 5), 7, 7) == ((0, 0, 0), (0, 3, 5))


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
        runs = cut(rank)
        found = read(local, manifest, {name: run.bounds() for name, run in runs.items()})
        for name, run in runs.items():
            expected = run.data.clone()
            run.data.zero_()
            run.take(found[name])
            assert torch.equal(run.data, expected)
    assert len(list(Path(str(local)).glob("*/shard-*"))) == 4
