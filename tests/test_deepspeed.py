"""DeepSpeed's ZeRO: the numbers of one plain PyTorch process, and checkpoints that any strategy goes on from."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

import plain_cnn
import pytest
import ranks
import torch
import zero_recipes
from dltrain.checkpoint.reader import catalogue, open_manifest, read
from dltrain.core.storage import Storage
from launching import Sandbox
from ranks import train_ranks
from runs import RunFolder
from torch import Tensor

pytest.importorskip("deepspeed")
ranks.preload("deepspeed", "deepspeed.runtime.zero.muon.original_muon")  # the latter compiles functions, which imports

slow = pytest.mark.slow
SMALL = {  # buckets that hold few tensors, several groups of them, and few that are kept whole
    "reduce_bucket_size": 400,
    "allgather_bucket_size": 400,
    "overlap_comm": False,
    "sub_group_size": 300,
    "stage3_param_persistence_threshold": 20,
    "stage3_prefetch_bucket_size": 100,
}
WORLDS = [
    *(("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero3", 1)),
    *(pytest.param(strategy, world, marks=slow) for strategy, world in [("zero1", 1), ("zero2", 1)]),
    *(pytest.param(strategy, 4, marks=slow) for strategy in ("zero1", "zero2", "zero3")),
]


def write_small(folder: Path) -> None:
    (folder / "small.json").write_text(json.dumps({"zero_optimization": SMALL}), encoding="utf-8")


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


@pytest.mark.parametrize(("strategy", "world"), WORLDS)
def test_the_cnn_trains_as_in_one_plain_process(tmp_path: Path, strategy: str, world: int) -> None:
    losses, norms, state, accuracy = plain_cnn.plain()
    run = train_ranks(tmp_path, world, *plain_cnn.JOB, f"parallel.strategy={strategy}")
    assert len(losses) > 20
    torch.testing.assert_close(run.losses(), losses, rtol=1e-5, atol=0)
    torch.testing.assert_close([row["train/grad_norm"] for row in run.rows()], norms, rtol=1e-4, atol=0)
    assert run.rows()[-1]["test/accuracy"] == pytest.approx(accuracy, abs=0.005)
    assert_weights(run, "cnn", state)


@pytest.mark.parametrize(
    ("strategy", "world", "more"),
    [
        ("zero1", 2, ("parallel.offload=cpu",)),
        ("zero2", 2, ("train.recompute=true",)),
        ("zero3", 2, ("parallel.offload=cpu", "train.recompute=true", "parallel.deepspeed=small.json")),
        pytest.param("zero1", 4, ("train.recompute=true", "parallel.deepspeed=small.json"), marks=slow),
        pytest.param("zero2", 4, ("parallel.offload=cpu", "parallel.deepspeed=small.json"), marks=slow),
        pytest.param("zero3", 4, (), marks=slow),
    ],
)
def test_tied_and_frozen_weights_train_as_in_one_plain_process(
    tmp_path: Path, strategy: str, world: int, more: tuple[str, ...]
) -> None:
    write_small(tmp_path)
    options = {"lr": 0.3, "momentum": 0.8}
    plain = zero_recipes.train_plain(
        zero_recipes.LanguageRecipe(), zero_recipes.write_data(tmp_path), {"lm": (torch.optim.SGD, options, 1)}
    )
    sgd = "train.optimizer={name: sgd, lr: 0.3, momentum: 0.8}"
    job = ("recipe=zero_recipes:LanguageRecipe", *zero_recipes.JOB, sgd, f"parallel.strategy={strategy}")
    run = train_ranks(tmp_path, world, *job, *more)
    assert len(run.losses()) > 20
    torch.testing.assert_close(run.losses(), plain.losses["lm"], rtol=1e-5, atol=0)
    assert_weights(run, "lm", plain.modules["lm"].state_dict())


@pytest.mark.parametrize("strategy", ["zero1", pytest.param("zero2", marks=slow), "zero3"])
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
    """Train ``steps`` more steps under each (strategy, number of ranks), each from the last one's checkpoint."""
    for index, (strategy, world) in enumerate(route, start=1):
        until = ("train.schedule.name=constant", f"train.steps={index * steps}")
        more = () if strategy == "ddp" else ("parallel.deepspeed=small.json",)
        more += ("parallel.offload=cpu",) if strategy == "zero1" else ()
        run = train_ranks(folder, world, *job, *until, *more, f"parallel.strategy={strategy}")
    return run


LANGUAGE = ("recipe=zero_recipes:LanguageRecipe", *zero_recipes.JOB, "train.optimizer.lr=0.02")


@pytest.mark.parametrize(
    "route",
    [
        [("ddp", 2), ("zero3", 2), ("zero1", 2)],
        pytest.param([("ddp", 1), ("zero1", 2), ("zero3", 2), ("zero2", 4), ("zero3", 3), ("ddp", 2)], marks=slow),
    ],
)
def test_a_run_goes_on_under_any_strategy_and_number_of_ranks(tmp_path: Path, route: list[tuple[str, int]]) -> None:
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    for folder in (straight, changing):
        folder.mkdir()
        zero_recipes.write_data(folder)
        write_small(folder)
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


def test_a_piece_that_is_damaged_for_one_rank_alone_has_all_go_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    job = (*plain_cnn.JOB, "parallel.strategy=zero3", "checkpoint.every=2", "train.schedule.name=constant")
    storage = Storage(str(train_ranks(tmp_path, 2, *job, "train.steps=4").path / "checkpoints"))
    pieces = [piece for tensor in open_manifest(storage, 4).tensors.values() for piece in tensor.blocks()]
    piece = max((p for p in pieces if p.file.startswith("shard-00001-")), key=lambda p: prod(p.shape))
    with (Path(str(storage)) / "step-00000004" / piece.file).open("r+b") as file:
        file.seek(piece.begin)
        file.write(bytes(8))
    train_ranks(tmp_path, 2, *job, "train.steps=5")
    log = (tmp_path / "rank0.log").read_text()
    assert re.search(r"note: text=checkpoint of step 4 is not usable: rank 1: .* do not match", log), log
    assert re.search(r"step 3 ", log), log


@pytest.mark.parametrize("strategy", [pytest.param("zero2", marks=slow), "zero3"])
def test_averages_and_bfloat16_are_those_of_ddp(tmp_path: Path, strategy: str) -> None:
    split = ("data.split.train=0.74", "data.split.val=0.13", "data.split.test=0.13")
    more = ("train.ema=0.8", "train.precision=bf16", "train.steps=7", "train.evaluate_every=3")
    found: dict[str, RunFolder] = {}
    for name in ("ddp", strategy):
        (tmp_path / name).mkdir()
        found[name] = train_ranks(tmp_path / name, 2, *plain_cnn.JOB, *split, *more, f"parallel.strategy={name}")
    ours, theirs = (found[name].numbers() for name in (strategy, "ddp"))
    assert "val/loss" in ours[2]
    assert ours == [pytest.approx(row, rel=1e-5) for row in theirs]


def test_running_statistics_are_saved_as_under_ddp(tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for strategy in ("ddp", "zero3"):
        (tmp_path / strategy).mkdir()
        zero_recipes.write_vectors(tmp_path / strategy)
        job = ("recipe=zero_recipes:NormalizedRecipe", *zero_recipes.JOB, "train.steps=8")
        found.append(saved(train_ranks(tmp_path / strategy, 2, *job, f"parallel.strategy={strategy}")))
    assert "model.net.1.running_var" in found[0]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_the_launcher_trains_under_zero(sandbox: Sandbox) -> None:
    split = ("data.split.train=0.74", "data.split.val=0.13", "data.split.test=0.13")
    job = ("train.steps=4", "tracking.wandb.mode=disabled", *split, "parallel.strategy=zero3")
    done = sandbox.run("launch", "--nproc-per-node", "2", *job)
    assert done.returncode == 0, done.stderr
    run = RunFolder((sandbox.folder / "runs/digits/latest").resolve())
    assert run.steps() == [1, 2, 3, 4]
    assert (run.path / "weights.safetensors").is_file()
    logs = [file.read_text() for file in run.path.glob("logs/**/*") if file.is_file()]
    assert len(logs) >= 2
    assert not any("deepspeed" in log.lower() or "Warning" in log for log in logs)
