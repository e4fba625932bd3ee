"""Every built-in recipe on one rank and on two: the same losses, with dropout on."""

from __future__ import annotations

from pathlib import Path

import dltrain
import pytest
import torch
from dltrain.core.job import Job
from dltrain.models.registry import RECIPES
from ranks import train_ranks

TEXT = ("data.source=stdlib_text", "data.split.train=0.997", "data.split.val=0.001", "data.split.test=0.002")
JOBS = {
    "cnn": (
        *("model.residual=true", "model.norm=batch", "model.batch_norm=microbatch"),
        *("model.widths=[8, 16]", "model.label_smoothing=0.1"),
    ),
    "mlp": ("data.source=wine", "model.inputs=13"),
    "mlp regress": ("data.source=diabetes", "model.task=regress", "model.inputs=10", "model.offset=150"),
    "rnn": ("model.cell=lstm", "model.layers=2", "model.hidden=16", "model.bidirectional=true"),
    "rnn forecast": (
        *("data.source=digits_scan", "model.task=forecast", "model.inputs=1", "model.hidden=16"),
        *("model.offset=5", "model.scale=6", "model.loss=huber"),
    ),
    "rnn next_token": (*TEXT, "model.task=next_token", "model.hidden=16", "data.options.length=16"),
    "transformer": (*TEXT, "data.options.length=16", "model.dropout=0.2"),
    "transformer classify": ("model.task=classify", "model.inputs=8", "model.dropout=0.2"),
}
COMMON = (
    *("train.steps=8", "train.global_batch=24", "train.evaluate_every=1000", "train.clip_norm=1.0"),
    "tracking.wandb.mode=disabled",
)


def losses(folder: Path, world: int, *job: str) -> list[float]:
    """Of all steps, and of the test part."""
    folder.mkdir()
    run = train_ranks(folder, world, *COMMON, *job)
    return [*run.losses(), run.rows()[-1]["test/loss"]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint at the end."""
    (checkpoints,) = folder.rglob("checkpoints")
    return dict(dltrain.load_checkpoint(checkpoints))


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_compute_what_one_does(name: str, tmp_path: Path) -> None:
    job = (f"recipe={name.split()[0]}", "train.microbatches=2", *JOBS[name])
    one, two = losses(tmp_path / "one", 1, *job), losses(tmp_path / "two", 2, *job)
    # The running averages that evaluation uses are rank 0's, which has seen half of the microbatches.
    compared = 8 if name == "cnn" else 9
    assert two[:compared] == pytest.approx(one[:compared], rel=1e-5)
    assert len(one) == len(two) == 9
    assert len(set(one)) == 9


def test_every_recipe_is_among_them_and_named_in_the_schema() -> None:
    assert {name.split()[0] for name in JOBS} | {"gan"} == set(RECIPES)  # which has two losses: test_gan.py
    assert all(f"'{name}'" in (Job.model_fields["recipe"].description or "") for name in RECIPES)


@pytest.mark.parametrize("parallel", ["parallel.strategy=ddp", "parallel.tensor=2"])
def test_synchronised_batch_norm_is_that_of_the_whole_batch(tmp_path: Path, parallel: str) -> None:
    """One rank's single microbatch, by torch's own batch norm, against two ranks' halves, or the same on both."""
    job = ("recipe=cnn", "model.norm=batch", "model.batch_norm=synchronised", "model.dropout=0", "model.widths=[8, 16]")
    one, two = losses(tmp_path / "one", 1, *job), losses(tmp_path / "two", 2, *job, parallel)
    assert two == pytest.approx(one, rel=1e-5)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys()
    assert "model.cnn.convolutions.0.1.running_var" in first
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)


def test_statistics_of_microbatches_are_others(tmp_path: Path) -> None:
    job = ("recipe=cnn", "model.norm=batch", "model.dropout=0", "model.widths=[8, 16]")
    one, apart = losses(tmp_path / "one", 1, *job), losses(tmp_path / "apart", 2, *job)
    assert apart != pytest.approx(one, rel=1e-3)
