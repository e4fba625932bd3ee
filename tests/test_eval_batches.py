"""Evaluation batches: every sample once, over any number of ranks, normalised as in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dltrain.data.loader import eval_batches
from dltrain.data.normalize import Normalizer
from dltrain.data.sources import ArraySource
from hypothesis import given, settings
from hypothesis import strategies as st


class Numbers:
    """A source whose x is the sample's index."""

    def __len__(self) -> int:
        return 1000

    def fetch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return {"x": torch.from_numpy(indices.copy())}


@given(n=st.integers(0, 300), ranks=st.integers(1, 9), batch_size=st.integers(1, 64), as_range=st.booleans())
@settings(max_examples=100, deadline=None)
def test_evaluation_sees_every_sample_once(n: int, ranks: int, batch_size: int, as_range: bool) -> None:
    source = Numbers()
    indices = range(7, 7 + 3 * n, 3) if as_range else np.arange(n)[::-1] * 3
    alone = list(eval_batches(source, indices, rank=0, data_ranks=1, batch_size=batch_size))
    dealt = [
        list(eval_batches(source, indices, rank=rank, data_ranks=ranks, batch_size=batch_size)) for rank in range(ranks)
    ]
    assert len({len(items) for items in dealt}) == 1
    padding = [item for items in dealt for item in items if item[1] == 0]
    assert all(batch.weight == 0 and len(batch["x"]) == 1 for batch, _ in padding)
    assert len(padding) < ranks
    shared = [item for items in dealt for item in items if item[1] > 0]
    assert [i for batch, _ in shared for i in batch["x"].tolist()] == list(indices)
    assert [(batch.index, batch["x"].tolist(), count) for batch, count in shared] == [
        (batch.index, batch["x"].tolist(), count) for batch, count in alone
    ]
    assert all(count == len(batch["x"]) <= batch_size for batch, count in shared)
    assert sum(batch.weight for batch, _ in shared) == pytest.approx(1.0 if n else 0.0)


def test_evaluation_normalises() -> None:
    source = ArraySource({"x": np.arange(10.0)})
    scaled = Normalizer(4.0, 2.0)
    ((batch, count),) = eval_batches(source, range(4, 8), rank=0, data_ranks=1, batch_size=9, normalizer=scaled)
    assert batch["x"].tolist() == [0.0, 0.5, 1.0, 1.5]
    assert count == 4
