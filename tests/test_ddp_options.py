"""Gradients under ddp: compressed ones train close to whole ones, and are not the same; odd ones train as any."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import train_ranks

JOB = (
    *("model.widths=[16, 32]", "model.hidden=64", "train.steps=60", "train.microbatches=4"),
    *("train.optimizer.name=sgd", "train.optimizer.lr=0.05"),
)


@pytest.mark.parametrize(
    ("compress", "apart"),
    [
        (("parallel.compress=bf16",), 0.01),
        (("parallel.compress=powersgd", "parallel.powersgd_rank=4", "parallel.powersgd_start=5"), 0.2),
    ],
)
def test_compressed_gradients_train_nearly_as_whole_ones(
    tmp_path: Path, compress: tuple[str, ...], apart: float
) -> None:
    for name in ("whole", "small"):
        (tmp_path / name).mkdir()
    whole = train_ranks(tmp_path / "whole", 2, *JOB)
    small = train_ranks(tmp_path / "small", 2, *JOB, *compress)
    assert small.losses()[0] == whole.losses()[0]
    assert small.losses() != whole.losses()
    assert small.rows()[-1]["val/loss"] == pytest.approx(whole.rows()[-1]["val/loss"], abs=apart)
    assert small.rows()[-1]["val/loss"] < 0.4 * small.losses()[0]


def test_powersgd_begins_when_it_is_told_to(tmp_path: Path) -> None:
    for name in ("whole", "small"):
        (tmp_path / name).mkdir()
    job = (*JOB, "train.steps=8", "train.schedule.name=constant")
    whole = train_ranks(tmp_path / "whole", 2, *job).losses()
    small = train_ranks(tmp_path / "small", 2, *job, "parallel.compress=powersgd", "parallel.powersgd_start=4").losses()
    assert small[:5] == pytest.approx(whole[:5], rel=1e-6)
    assert small[5] != pytest.approx(whole[5], rel=1e-6)


@pytest.mark.parametrize("recipe", ["Spectral", "Sparse"])
def test_complex_weights_and_sparse_gradients_train_on_any_number_of_ranks(tmp_path: Path, recipe: str) -> None:
    plain = "train.optimizer={name: sgd, lr: 0.01, momentum: 0.0}"
    job = (f"recipe=odd_recipes:{recipe}", plain, "train.steps=6", "train.microbatches=2")
    found: list[list[float]] = []
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        found.append(train_ranks(tmp_path / str(world), world, *job).losses())
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][-1] != found[0][0]
