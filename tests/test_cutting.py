"""Boxes are cut into blocks that tile them, and their number is known without making them."""

from __future__ import annotations

from math import prod

import numpy as np
from dltrain.checkpoint.cutting import count, cut
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=4), st.sampled_from([1, 4]), st.data())
def test_blocks_follow_each_other_in_their_box(axes: list[tuple[int, int]], itemsize: int, data: st.DataObject) -> None:
    offset, shape = tuple(at for at, _ in axes), tuple(extent for _, extent in axes)
    limit = data.draw(st.integers(1, 2 * itemsize * max(1, prod(shape))))
    blocks = list(cut(offset, shape, itemsize, limit))
    assert len(blocks) == count(shape, itemsize, limit)
    assert all(prod(extents) * itemsize <= limit or prod(extents) == 1 for _, extents in blocks)
    box = np.arange(prod(shape)).reshape(shape)
    found = list[int]()
    for at, extents in blocks:
        spans = zip(at, offset, extents, strict=True)
        found += box[tuple(slice(a - o, a - o + n) for a, o, n in spans)].reshape(-1).tolist()
    assert found == box.reshape(-1).tolist()


def test_many_blocks_are_counted_at_once() -> None:
    assert count((2**40, 2**20), 4, 1) == 2**60
    assert count((3, 1, 5, 1000), 4, 4000) == 15
