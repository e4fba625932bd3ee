"""Training in float16: losses are scaled, steps whose gradients overflow are skipped by all ranks, and none is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ranks
import torch
import zero_recipes
from dltrain.checkpoint.reader import catalogue, open_manifest, read
from dltrain.core.storage import Storage
from dltrain.strategies.scaling import LossScale
from jobfiles import problem
from ranks import run_ranks, train_ranks
from runs import RunFolder
from torch import Tensor, nn

ranks.preload("deepspeed", "deepspeed.runtime.zero.muon.original_muon")

slow = pytest.mark.slow
MODEL = ("model.widths=[4]", "model.hidden=8", "train.microbatches=2", "train.schedule.name=constant")
HALF = (*MODEL, "recipe=half_recipes:Scaled", "train.precision=fp16")
EVERY_STEP = ("checkpoint.every=1", "checkpoint.keep=99", "model.paced=true")


def saved(run: RunFolder) -> dict[int, dict[str, Tensor]]:
    """The tensors of every checkpoint, by step."""
    storage = Storage(str(run.path / "checkpoints"))
    return {entry.step: read(storage, open_manifest(storage, entry.step)) for entry in catalogue(storage)}


def numbers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("scaling.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "parallel",
    [
        (1, ()),
        (2, ()),
        (2, ("train.optimizer.name=muon",)),
        (2, ("parallel.strategy=fsdp",)),
        (2, ("parallel.tensor=2",)),
        (2, ("parallel.pipeline=2",)),
        (2, ("parallel.strategy=zero1",)),
        pytest.param((2, ("parallel.strategy=zero2", "parallel.offload=cpu")), marks=slow),
        (2, ("parallel.strategy=zero3",)),
        pytest.param((2, ("parallel.strategy=zero3", "parallel.offload=cpu")), marks=slow),
    ],
)
def test_a_step_that_overflows_changes_nothing_on_any_rank_and_is_told(
    tmp_path: Path, parallel: tuple[int, tuple[str, ...]]
) -> None:
    world, options = parallel
    if any("zero" in option for option in options):
        pytest.importorskip("deepspeed")
    job = (*HALF, *EVERY_STEP, "model.at=2", "train.steps=5", "train.clip_norm=0.5", "train.ema=0.9", *options)
    run = train_ranks(tmp_path, world, *job)
    assert [row["train/loss_scale"] for row in run.rows()] == [2.0**16] * 3 + [2.0**15] * 2
    assert [row["train/skipped_steps"] for row in run.rows()] == [0, 0, 1, 1, 1]
    assert [row["step"] for row in run.rows() if "train/grad_norm" not in row] == [3]
    states = saved(run)
    assert same(numbers(states[2]), numbers(states[3]))
    assert not same(numbers(states[1]), numbers(states[2]))
    changed = [name for name, tensor in states[4].items() if not torch.equal(tensor, states[3][name])]
    assert {name.split(".")[0] for name in changed} == {"model", "optimizer", "ema", "scaling"}
    told = [line for line in (tmp_path / "rank0.log").read_text().splitlines() if "changed no weight" in line]
    assert len(told) == 1
    assert "step 3 changed no weight of 'cnn'" in told[0]


@pytest.mark.parametrize(
    "options",
    [("parallel.strategy=fsdp",), ("parallel.tensor=2",), ("parallel.pipeline=2",), ("parallel.strategy=zero3",)],
)
def test_ranks_find_what_one_process_finds(tmp_path: Path, options: tuple[str, ...]) -> None:
    pytest.importorskip("deepspeed")
    job = (*HALF, "model.at=3", "train.steps=12", "train.clip_norm=0.5")
    found: list[list[float]] = []
    for name, world, more in (("one", 1, ()), ("two", 2, options)):
        (tmp_path / name).mkdir()
        run = train_ranks(tmp_path / name, world, *job, *more)
        found.append([*run.losses(), *(row.get("train/grad_norm", 0.0) for row in run.rows())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)


def test_it_learns_as_in_float32_and_keeps_weights_whole(tmp_path: Path) -> None:
    runs: dict[str, RunFolder] = {}
    for precision in ("fp32", "fp16"):
        (tmp_path / precision).mkdir()
        job = (*MODEL, "train.steps=60", "train.optimizer.lr=0.01", f"train.precision={precision}")
        runs[precision] = train_ranks(tmp_path / precision, 2, *job)
    full, half = (run.losses() for run in runs.values())
    assert full != half
    torch.testing.assert_close(full, half, rtol=0.05, atol=0.02)
    assert half[-1] < 0.7 * half[0]
    accuracies = [run.rows()[-1]["test/accuracy"] for run in runs.values()]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.03)
    floats = {tensor.dtype for name, tensor in saved(runs["fp16"])[60].items() if not name.startswith("scaling.")}
    assert floats == {torch.float32}


def test_gradients_that_float16_does_not_hold_are_kept_by_scaling(tmp_path: Path) -> None:
    norms: list[list[float]] = []
    for precision in ("fp32", "fp16"):
        (tmp_path / precision).mkdir()
        job = (*HALF, "model.times=1e-6", "train.steps=3", "train.clip_norm=1", f"train.precision={precision}")
        run = train_ranks(tmp_path / precision, 1, *job)
        norms.append([row["train/grad_norm"] for row in run.rows()])
    assert max(norms[0]) < 1e-5
    torch.testing.assert_close(norms[0], norms[1], rtol=0.02, atol=0)


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_the_scale_goes_on_after_a_resume_to_the_bit_and_under_another_strategy(tmp_path: Path, strategy: str) -> None:
    if strategy != "ddp":
        pytest.importorskip("deepspeed")
    job = (*HALF, "model.at=2", "train.ema=0.9", f"parallel.strategy={strategy}")
    whole, parted, other = (tmp_path / name for name in ("whole", "parted", "other"))
    for folder in (whole, parted, other):
        folder.mkdir()
    straight = saved(train_ranks(whole, 2, *job, "train.steps=8"))[8]
    train_ranks(parted, 2, *job, "train.steps=4")
    run = train_ranks(parted, 2, *job, "train.steps=8")
    assert same(saved(run)[8], straight)
    assert [straight[f"scaling.cnn.{name}"].item() for name in ("scale", "good", "skipped")] == [2.0**15, 5, 1]
    assert run.rows()[-1]["train/skipped_steps"] == 1
    train_ranks(other, 2, *job, "train.steps=4")
    changed = saved(train_ranks(other, 2, *job[:-1], "train.steps=8", "parallel.strategy=fsdp"))[8]
    for name, tensor in changed.items():
        torch.testing.assert_close(tensor, straight[name], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(changed[name], straight[name]) for name in changed if name.startswith("scaling."))


def test_each_part_has_a_scale_of_its_own(tmp_path: Path) -> None:
    zero_recipes.write_vectors(tmp_path)
    generator = "train.parts={generator: {every: 2}}"
    job = (*zero_recipes.JOB, generator, "train.precision=fp16", "train.steps=5")
    run = train_ranks(tmp_path, 2, "recipe=half_recipes:Gan", *job, "train.epochs=20")
    scales = {
        part: [row.get(f"train/{part}/loss_scale") for row in run.rows()] for part in zero_recipes.GanRecipe().parts()
    }
    assert scales == {
        "discriminator": [2.0**16, 2.0**16, 2.0**15, 2.0**15, 2.0**15],
        "generator": [2.0**16, None, 2.0**16, None, 2.0**16],
    }
    state = saved(run)[5]
    assert [state[f"scaling.{part}.good"].item() for part in scales] == [3, 3]


def test_the_scale_moves_as_that_of_torchs_grad_scaler() -> None:
    ours, theirs = LossScale("net"), torch.amp.GradScaler("cpu")
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 0.0)
    overflows = {0, 5, 6, 2100}
    for step in range(2110):
        factor = theirs.scale(torch.ones(())).item()
        gradient = torch.tensor([1.0, float("inf") if step in overflows else 3.0]) * factor
        weight.grad = gradient.clone()
        found = ours.unscale([weight], world=1, device=weight.device)
        assert (found.factor, found.overflowed) == (factor, step in overflows)
        assert weight.grad.tolist() == (gradient / factor).tolist()
        weight.grad = gradient
        theirs.step(optimizer)
        theirs.update()
    assert [tensor.data.item() for name, tensor in ours.state() if name.endswith("skipped")] == [4]
    assert ours.factor == theirs.get_scale() == 2.0**13


def _unscale_apart(infinite: int) -> int:
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    piece = nn.Parameter(torch.zeros(3))
    piece.grad = torch.full((3,), float("nan") if rank == infinite else 1.0)
    return 0 if LossScale("net").unscale([piece], world=2, device=piece.device).overflowed else 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_from_before_its_first_good_step(tmp_path: Path, strategy: str) -> None:
    job = (*HALF, "model.at=0", "train.ema=0.9", f"parallel.strategy={strategy}")
    first = saved(train_ranks(tmp_path, 2, *job, "train.steps=1"))[1]
    assert not [name for name in first if name.startswith("optimizer.")]
    run = train_ranks(tmp_path, 2, *job, "train.steps=3")
    assert [row["train/skipped_steps"] for row in run.rows()] == [1, 1, 1]
    counts = [tensor.item() for name, tensor in saved(run)[3].items() if name.endswith(".step")]
    assert set(counts) == {2.0}


def test_scaling_begins_anew_after_another_precision(tmp_path: Path) -> None:
    train_ranks(tmp_path, 1, *MODEL, "recipe=half_recipes:Scaled", "train.steps=2")
    run = train_ranks(tmp_path, 1, *HALF, "train.steps=3")
    assert [row.get("train/loss_scale") for row in run.rows()] == [None, None, 2.0**16]


def test_ranks_agree_where_one_alone_has_infinities(tmp_path: Path) -> None:
    assert run_ranks(_unscale_apart, 2, tmp_path, 1) == [0, 0]
    assert run_ranks(_unscale_apart, 2, tmp_path, 2) == [1, 1]


def test_gradients_that_are_not_finite_at_any_scale_end_the_run() -> None:
    scale = LossScale("net")
    for _ in range(16):
        scale.settle(overflowed=True)
    assert scale.factor == 1
    with pytest.raises(FloatingPointError, match=r"part 'net' are not finite.*bf16"):
        scale.settle(overflowed=True)


@pytest.mark.usefixtures("empty_folder")
def test_what_infinite_gradients_would_spoil_is_refused() -> None:
    found = problem(None, "train.precision=fp16", "parallel.compress=powersgd")
    assert "PowerSGD would remember" in found.what
    assert "parallel.compress" in found.where


def test_an_lstm_is_refused_where_torch_has_none_in_float16(tmp_path: Path) -> None:
    try:
        with torch.autocast("cpu", torch.float16):
            nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
    except RuntimeError:
        pass
    else:
        pytest.skip("this processor computes an LSTM in float16")
    with pytest.raises(AssertionError, match=r"torch has no LSTM in float16 for this cpu(?s:.*)bf16 would do"):
        train_ranks(tmp_path, 1, "recipe=rnn", "model.cell=lstm", "train.steps=1", "train.precision=fp16")
