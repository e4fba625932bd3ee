"""DeepSpeed's ZeRO: the numbers of one plain PyTorch process, and checkpoints that any strategy goes on from."""

from __future__ import annotations

from pathlib import Path

import plain_cnn
import pytest
import ranks
import torch
import zero_recipes
from dltrain.checkpoint.reader import catalogue, open_manifest, read
from dltrain.core.storage import Storage
from ranks import train_ranks
from runs import RunFolder
from torch import Tensor

pytest.importorskip("deepspeed")
ranks.preload("deepspeed", "deepspeed.runtime.zero.muon.original_muon")  # the latter compiles functions, which imports

STAGES = ("zero1", "zero2", "zero3")
SLOW_ON_FOUR = [*((s, 2) for s in STAGES), ("zero3", 1), *(pytest.param(s, 4, marks=pytest.mark.slow) for s in STAGES)]
SGD = ("train.optimizer.name=sgd", "train.optimizer.lr=0.3", "train.optimizer.momentum=0.8")


def saved(run: RunFolder) -> dict[str, Tensor]:
    """Everything in a run's newest checkpoint."""
    storage = Storage(str(run.path / "checkpoints"))
    return read(storage, open_manifest(storage, catalogue(storage)[0].step))


def assert_weights(run: RunFolder, part: str, module_state: dict[str, Tensor]) -> None:
    begin = f"model.{part}."
    trained = {name.removeprefix(begin): tensor for name, tensor in saved(run).items() if name.startswith(begin)}
    assert trained.keys() == module_state.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, module_state[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("strategy", "world"), SLOW_ON_FOUR)
def test_the_cnn_trains_as_in_one_plain_process(tmp_path: Path, strategy: str, world: int) -> None:
    losses, norms, state, accuracy = plain_cnn.plain()
    run = train_ranks(tmp_path, world, *plain_cnn.JOB, f"parallel.strategy={strategy}")
    assert len(losses) > 20
    torch.testing.assert_close(run.losses(), losses, rtol=1e-5, atol=0)
    torch.testing.assert_close([row["train/grad_norm"] for row in run.rows()], norms, rtol=1e-4, atol=0)
    assert run.rows()[-1]["test/accuracy"] == pytest.approx(accuracy, abs=0.005)
    assert_weights(run, "cnn", state)


@pytest.mark.parametrize(("strategy", "world"), SLOW_ON_FOUR)
def test_tied_and_frozen_weights_train_as_in_one_plain_process(tmp_path: Path, strategy: str, world: int) -> None:
    options = {"lr": 0.3, "momentum": 0.8}
    plain = zero_recipes.train_plain(
        zero_recipes.LanguageRecipe(), zero_recipes.write_data(tmp_path), {"lm": (torch.optim.SGD, options, 1)}
    )
    job = ("recipe=zero_recipes:LanguageRecipe", *zero_recipes.JOB, *SGD, f"parallel.strategy={strategy}")
    run = train_ranks(tmp_path, world, *job)
    assert len(run.losses()) > 20
    torch.testing.assert_close(run.losses(), plain.losses["lm"], rtol=1e-5, atol=0)
    assert_weights(run, "lm", plain.modules["lm"].state_dict())


@pytest.mark.parametrize("strategy", STAGES)
def test_two_parts_train_in_turn_as_in_one_plain_process(tmp_path: Path, strategy: str) -> None:
    adam = {"lr": 0.01, "betas": (0.5, 0.999)}
    plain = zero_recipes.train_plain(
        zero_recipes.GanRecipe(),
        zero_recipes.write_vectors(tmp_path),
        {"discriminator": (torch.optim.Adam, adam, 1), "generator": (torch.optim.Adam, adam | {"lr": 0.02}, 2)},
    )
    optimizers = (
        "train.optimizer={name: adam, lr: 0.01, betas: [0.5, 0.999]}",
        "train.parts={generator: {lr: 0.02, every: 2}}",
    )
    job = ("recipe=zero_recipes:GanRecipe", *zero_recipes.JOB, *optimizers, f"parallel.strategy={strategy}")
    run = train_ranks(tmp_path, 2, *job)
    for part, losses in plain.losses.items():
        found = [row[f"train/{part}/loss"] for row in run.rows() if f"train/{part}/loss" in row]
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=0)
        assert_weights(run, part, plain.modules[part].state_dict())
