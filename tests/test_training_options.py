"""Averaged weights, early stopping, plateaus, bfloat16, recomputation: what each does to a run's numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from dltrain.checkpoint.export import export_weights
from dltrain.checkpoint.reader import catalogue, open_manifest, read
from dltrain.core.storage import Storage
from dltrain.models.cnn import Cnn, CnnConfig
from dltrain.training.course import Watch
from jobfiles import problem
from ranks import train_ranks
from runs import RunFolder
from safetensors.torch import load_file

MODEL = ("model.widths=[4]", "model.hidden=8", "model.dropout=0.2", "train.microbatches=2")


def saved(run: RunFolder) -> dict[int, dict[str, torch.Tensor]]:
    """The tensors of every checkpoint, by step."""
    storage = Storage(str(run.path / "checkpoints"))
    return {entry.step: read(storage, open_manifest(storage, entry.step)) for entry in catalogue(storage)}


# ---- averaged weights


@pytest.mark.parametrize("ranks", [1, 2])
def test_averaged_weights_follow_the_weights_and_are_what_is_evaluated_and_exported(tmp_path: Path, ranks: int) -> None:
    job = ("train.ema=0.9", "checkpoint.keep=99", "train.evaluate_every=12")
    for last in range(1, 5):
        run = train_ranks(tmp_path, ranks, *MODEL, *job, f"train.steps={last}")
    states = saved(run)
    assert sorted(states) == [1, 2, 3, 4]
    average = {k: v for k, v in states[1].items() if k.startswith("ema.")}
    for step in range(2, 5):
        decay = min(0.9, (1 + step - 1) / (10 + step - 1))
        average = {k: decay * v + (1 - decay) * states[step][f"model{k[3:]}"] for k, v in average.items()}
    for name, value in average.items():
        torch.testing.assert_close(states[4][name], value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(states[4][name], states[4][f"model{name[3:]}"])
    storage = Storage(str(run.path / "checkpoints"))
    export_weights(storage, open_manifest(storage, 4), tmp_path / "weights.safetensors")
    exported = load_file(tmp_path / "weights.safetensors")
    assert {f"ema.cnn.{k}": v for k, v in exported.items()}.keys() == average.keys()
    assert all(torch.equal(v, states[4][f"ema.cnn.{k}"]) for k, v in exported.items())
    Cnn(CnnConfig(widths=[4], hidden=8)).load_state_dict(exported)


def test_averaged_weights_go_on_after_a_resume_and_change_no_weight(tmp_path: Path) -> None:
    once, twice, without = (tmp_path / name for name in ("once", "twice", "without"))
    for folder in (once, twice, without):
        folder.mkdir()
    ema = ("train.ema=0.9", "train.schedule.name=constant", "train.evaluate_every=5")
    whole = saved(train_ranks(once, 2, *MODEL, *ema, "train.steps=20"))[20]
    train_ranks(twice, 2, *MODEL, *ema, "train.steps=10")
    again = saved(train_ranks(twice, 2, *MODEL, *ema, "train.steps=20"))[20]
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    plain = saved(train_ranks(without, 2, *MODEL, *ema[1:], "train.steps=20"))[20]
    assert plain.keys() == {name for name in whole if not name.startswith("ema.")}
    assert all(torch.equal(whole[name], plain[name]) for name in plain)


# ---- what evaluations decide


def evaluations(run: RunFolder) -> list[tuple[int, float]]:
    return [(row["step"], row["val/loss"]) for row in run.rows() if "val/loss" in row]


def worn_at(values: list[float], patience: int, min_delta: float = 0.0) -> list[int]:
    """Places at which there was no new best for ``patience`` evaluations since the last such place, by hand."""
    places, best, since = [], float("inf"), 0
    for place, value in enumerate(values):
        if value < best - min_delta:
            best, since = value, 0
        else:
            since += 1
        if since == patience:
            places.append(place)
            since = 0
    return places


def test_training_ends_early_is_finished_then_and_does_so_again_after_a_resume(tmp_path: Path) -> None:
    stop = (
        "train.early_stop.patience=3",
        "train.early_stop.min_delta=0.05",
        "train.evaluate_every=4",
        "train.steps=400",
    )
    job = (*MODEL, *stop, "checkpoint.every=10", "checkpoint.keep=99", "train.optimizer.lr=0.01")
    run = train_ranks(tmp_path, 2, *job)
    steps, values = zip(*evaluations(run), strict=True)
    ended = steps[worn_at(list(values), 3, 0.05)[0]]
    assert 20 < ended < 400
    assert run.steps()[-1] == ended == max(saved(run))
    assert "test/accuracy" in run.rows()[-1]
    manifest = open_manifest(Storage(str(run.path / "checkpoints")), ended)
    assert manifest.total_steps == ended
    before = run.numbers()
    first = min(saved(run))  # one that came while it was being written may have been skipped
    for step in [step for step in saved(run) if step > first]:
        shutil.rmtree(run.path / f"checkpoints/step-{step:08d}")
    (run.path / "metrics.jsonl").unlink()
    assert train_ranks(tmp_path, 2, *job).numbers() == before[first:]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_rate_falls_when_the_metric_does_not_improve(tmp_path: Path, ranks: int) -> None:
    plateau = ("name=plateau", "patience=2", "factor=0.5", "warmup_steps=3")
    job = (*MODEL, *(f"train.schedule.{item}" for item in plateau), "train.evaluate_every=3", "train.optimizer.lr=0.05")
    run = train_ranks(tmp_path, ranks, *job, "train.steps=60")
    steps, values = zip(*evaluations(run), strict=True)
    falls = [steps[place] for place in worn_at(list(values), 2)]
    assert len(falls) >= 2
    for row in run.rows():
        done = row["step"] - 1
        expected = 0.05 * (done + 1) / 4 if done < 3 else 0.05 * 0.5 ** sum(step <= done for step in falls)
        assert row["train/lr"] == pytest.approx(expected), row["step"]


def test_a_metric_may_be_better_when_higher() -> None:
    watch = Watch("val/accuracy", "max", where="", patience=2, min_delta=0.01)
    values = (0.5, 0.6, 0.605, 0.4, 0.7, 0.6, 0.7)
    assert [watch.worn({"val/accuracy": value}) for value in values] == [*(3 * [False]), True, False, False, True]


def test_a_metric_that_is_no_number_is_never_the_best() -> None:
    watch = Watch("val/loss", "min", where="", patience=2)
    values = (float("nan"), 1.0, 0.5, float("nan"), 0.4)
    assert [watch.worn({"val/loss": value}) for value in values] == [False] * 5
    other = Watch("val/accuracy", "max", where="", patience=2)
    other.load(watch.state())  # another metric's best says nothing
    assert other.state()["best"] is None


@pytest.mark.usefixtures("empty_folder")
def test_watching_without_a_validation_part_or_a_metric_that_nobody_evaluates_is_refused(tmp_path: Path) -> None:
    no_val = "data: {split: {train: 0.9, val: 0, test: 0.1}}\n"
    for watching, where in (
        ("train: {early_stop: {patience: 2}}\n", "train.early_stop.patience"),
        ("train: {schedule: {name: plateau}}\n", "train.schedule.name"),
    ):
        found = problem(no_val + watching)
        assert "there is no validation part" in found.what
        assert found.where.endswith(where)
    for watching, where in (
        ("train: {early_stop: {patience: 2, metric: train/loss}}\n", "train.early_stop.metric"),
        ("train: {schedule: {name: plateau, metric: loss}}\n", "train.schedule.metric"),
    ):
        found = problem(watching)
        assert "is no metric of the validation part" in found.what
        assert found.hint == "such as 'val/loss'"
        assert found.where.endswith(where)
    with pytest.raises(AssertionError, match=r"no metric 'val/los' is evaluated.*known: val/accuracy, val/loss"):
        train_ranks(tmp_path, 1, *MODEL, "train.early_stop.patience=1", "train.early_stop.metric=val/los")


# ---- precision, memory, speed


def test_bfloat16_computes_otherwise_and_keeps_weights_whole(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("fp32", "bf16")]
    runs = []
    for folder in folders:
        folder.mkdir()
        runs.append(train_ranks(folder, 2, *MODEL, "train.steps=30", f"train.precision={folder.name}"))
    full, half = (run.losses() for run in runs)
    assert full != half
    torch.testing.assert_close(full, half, rtol=0.03, atol=0.03)
    assert {tensor.dtype for tensor in saved(runs[1])[30].values()} == {torch.float32}
    losses = [evaluations(run)[-1][1] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize("ranks", [1, 2])
def test_recomputation_changes_no_number(tmp_path: Path, ranks: int) -> None:
    folders = [tmp_path / name for name in ("false", "true")]
    runs = []
    for folder in folders:
        folder.mkdir()
        runs.append(train_ranks(folder, ranks, *MODEL, "train.steps=20", f"train.recompute={folder.name}"))
    assert runs[0].numbers() == runs[1].numbers()


@pytest.mark.slow
def test_a_compiled_model_computes_the_same(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("false", "true")]
    runs = []
    for folder in folders:
        folder.mkdir()
        job = (*MODEL, "model.dropout=0", "train.steps=20", f"train.compile={folder.name}")
        runs.append(train_ranks(folder, 2, *job, timeout=250, TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor")))
    torch.testing.assert_close(runs[0].losses(), runs[1].losses(), rtol=1e-4, atol=1e-5)
