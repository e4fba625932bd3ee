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


def resume_along(folder: Path, job: tuple[str, ...], route: list[tuple[str, int]], steps: int) -> RunFolder:
    """Train ``steps`` more steps under each (strategy, number of ranks) in turn, each from the last one's checkpoint."""
    for index, (strategy, world) in enumerate(route, start=1):
        until = ("train.schedule.name=constant", f"train.steps={index * steps}")
        run = train_ranks(folder, world, *job, *until, f"parallel.strategy={strategy}")
    return run


LANGUAGE = ("recipe=zero_recipes:LanguageRecipe", *zero_recipes.JOB, "train.optimizer.lr=0.02")


@pytest.mark.parametrize(
    "route",
    [
        [("ddp", 2), ("zero3", 2), ("zero1", 2)],
        pytest.param(
            [("ddp", 1), ("zero1", 2), ("zero3", 2), ("zero2", 4), ("zero3", 3), ("ddp", 2)], marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_goes_on_under_any_strategy_and_number_of_ranks(tmp_path: Path, route: list[tuple[str, int]]) -> None:
    zero_recipes.write_data(tmp_path)
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    for folder in (straight, changing):
        folder.mkdir()
        zero_recipes.write_data(folder)
    job = (*LANGUAGE, "train.ema=0.9", "train.microbatches=12", "train.global_batch=24")
    whole = train_ranks(straight, 1, *job, "train.schedule.name=constant", f"train.steps={5 * len(route)}")
    run = resume_along(changing, job, route, steps=5)
    assert run.steps() == list(range(1, 5 * len(route) + 1))
    torch.testing.assert_close(run.losses(), whole.losses(), rtol=1e-5, atol=0)
    ours, reference = saved(run), saved(whole)
    assert ours.keys() == reference.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-4, atol=1e-6)


def test_every_rank_writes_its_own_part_of_the_state(tmp_path: Path) -> None:
    zero_recipes.write_data(tmp_path)
    run = train_ranks(tmp_path, 2, *LANGUAGE, "train.steps=1", "parallel.strategy=zero3")
    shards = sorted(file.stat().st_size for file in run.path.glob("checkpoints/*/shard-*"))
    assert len(shards) == 2
    assert shards[0] > 0.8 * shards[1]


@pytest.mark.parametrize("strategy", STAGES)
@pytest.mark.parametrize("setting", ["parallel.offload=cpu", "train.recompute=true"])
def test_what_saves_memory_changes_no_number(tmp_path: Path, strategy: str, setting: str) -> None:
    job = (*LANGUAGE, f"parallel.strategy={strategy}", "train.steps=6")
    losses: list[list[float]] = []
    for name, more in (("with", (setting,)), ("without", ())):
        (tmp_path / name).mkdir()
        zero_recipes.write_data(tmp_path / name)
        losses.append(train_ranks(tmp_path / name, 2, *job, *more).losses())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
