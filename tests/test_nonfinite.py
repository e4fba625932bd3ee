"""A loss that is not finite: no weight changes by it on any rank, whatever the strategy, and the samples are named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import ranks
import torch
from dltrain.checkpoint.reader import catalogue, open_manifest, read
from dltrain.core.config import load_job
from dltrain.core.storage import Storage
from dltrain.data.order import StepPlan
from dltrain.data.sources import open_source
from dltrain.data.split import split_source
from jobfiles import problem
from launching import Sandbox
from ranks import train_ranks
from runs import RunFolder
from torch import Tensor

ranks.preload("deepspeed", "deepspeed.runtime.zero.muon.original_muon")

slow = pytest.mark.slow
BROKEN = ("recipe=nonfinite_recipes:Broken", "model.widths=[4]", "model.hidden=8", "train.microbatches=2")
EVERY_STEP = ("checkpoint.every=1", "checkpoint.keep=99", "model.paced=true")
AT = ("model.at=2", "train.steps=5")


def saved(run: RunFolder) -> dict[int, dict[str, Tensor]]:
    storage = Storage(str(run.path / "checkpoints"))
    return {entry.step: read(storage, open_manifest(storage, entry.step)) for entry in catalogue(storage)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("world", "options"),
    [
        pytest.param(1, (), marks=slow),
        (2, ("train.clip_norm=0.5", "train.ema=0.9")),
        (2, ("model.dark=true", "model.norm=batch")),
        pytest.param(2, ("model.deep=true",), marks=slow),
        (2, ("parallel.strategy=fsdp",)),
        pytest.param(2, ("parallel.tensor=2",), marks=slow),
        (2, ("parallel.pipeline=2",)),
        pytest.param(2, ("parallel.pipeline=2", "train.clip_norm=0.5"), marks=slow),
        pytest.param(2, ("parallel.pipeline=2", "model.dark=true", "model.norm=batch"), marks=slow),
        pytest.param(2, ("parallel.strategy=zero1",), marks=slow),
        (2, ("parallel.strategy=zero3", "model.dark=true", "model.norm=batch")),
    ],
)
def test_a_step_that_is_skipped_changes_nothing_on_any_rank_and_is_told_once(
    tmp_path: Path, world: int, options: tuple[str, ...]
) -> None:
    if any("zero" in option for option in options):
        pytest.importorskip("deepspeed")
    run = train_ranks(tmp_path, world, *BROKEN, *AT, *EVERY_STEP, "train.nonfinite=skip", *options)
    assert [row["train/skipped_steps"] for row in run.rows()] == [0, 0, 1, 1, 1]
    states = saved(run)
    assert same(states[2], states[3])
    assert not same(states[1], states[2])
    assert not same(states[3], states[4])
    told = re.findall(r"note: text=.* is not finite at step 2: (.*?)\. The step", (tmp_path / "rank0.log").read_text())
    told += re.findall(r"note: text=the gradients .* at step 2, though every", (tmp_path / "rank0.log").read_text())
    assert len(told) == 1
    if not any("deep" in option for option in options):
        rank = 1 if world == 2 and not any("tensor" in option for option in options) else 0
        assert re.match(rf"(inf|nan) in microbatch 1 on rank {rank}, of the samples \d+", told[0]), told


def test_the_count_of_skipped_steps_goes_on_after_a_resume(tmp_path: Path) -> None:
    job = (*BROKEN, "model.at=2", "train.nonfinite=skip", "train.schedule.name=constant")
    train_ranks(tmp_path, 1, *job, "train.steps=4")
    run = train_ranks(tmp_path, 1, *job, "train.steps=6")
    assert [row["train/skipped_steps"] for row in run.rows()] == [0, 0, 1, 1, 1, 1]


def test_the_run_stops_with_the_samples_in_its_report_and_is_not_tried_again(sandbox: Sandbox) -> None:
    for name in ("nonfinite_recipes", "half_recipes", "zero_recipes"):
        (sandbox.folder / f"{name}.py").write_text(Path(__file__).with_name(f"{name}.py").read_text())
    job = (*BROKEN, *AT, "checkpoint.every=1", "tracking.wandb.mode=disabled")
    done = sandbox.run("launch", "--nodes", "2", "--max-restarts", "3", *job)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rank 1 on node 1 failed with NonFiniteLoss" in done.stderr
    run = RunFolder(sandbox.folder / "runs/digits/0001")
    assert run.steps() == [1, 2]
    (report,) = run.path.glob("failures/*.json")
    culprit = json.loads(report.read_text())["ranks"][0]
    assert (culprit["rank"], culprit["step"], culprit["error"]) == (1, 2, "NonFiniteLoss")
    (evidence,) = culprit["samples"]
    spec = load_job(None, job, {}, {}).job
    source = open_source(spec.data)
    train = split_source(source, spec.data.split)["train"]
    plan = StepPlan(n=len(train), seed=spec.seed, global_batch=spec.train.global_batch, microbatches=2, steps=5)
    assert evidence["indices"] == [train[place] for place in plan.microbatch(2, 1)[0]]
    assert (evidence["rank"], evidence["microbatch"], evidence["loss"]) == (1, 1, "inf")
    assert f"of the samples {evidence['indices'][0]}, " in report.with_suffix(".txt").read_text()


@pytest.mark.usefixtures("empty_folder")
def test_what_it_would_spoil_is_refused() -> None:
    found = problem(None, "train.nonfinite=skip", "parallel.compress=powersgd")
    assert "PowerSGD would remember" in found.what
