"""Ranks that are killed: at most a step is done again, and the bits are those of a run that nothing happened to."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from launching import Sandbox
from ranks import train_ranks
from runs import RunFolder
from stage import JOB, LAUNCH, assert_same_run, gate, put_recipe, run_of, wait_at_gate


def put(box: Sandbox, *generations: list[dict[str, object]]) -> None:
    for name in ("killed.py", "small_transformer.py"):
        shutil.copy(Path(__file__).with_name(name), box.folder)
    (box.folder / "kills.json").write_text(json.dumps(generations))


def test_killed_ranks_cost_at_most_a_step_and_no_bit(sandbox: Sandbox, reference: RunFolder) -> None:
    put(
        sandbox,
        [{"rank": 1, "step": 13, "how": "rank"}],
        [{"rank": 0, "step": 19, "how": "both"}, {"rank": 1, "step": 19, "how": "both"}],
        [{"rank": 0, "step": 26, "how": "torn"}],
    )
    job = (*JOB, "recipe=killed:Cnn", "recovery.snapshot=1", "recovery.max_restarts=3")
    done = sandbox.run(*LAUNCH, *job)
    assert done.returncode == 0, done.stdout + done.stderr
    run = run_of(sandbox)
    assert_same_run(run, reference)
    found = run.costs()
    assert [(cost["from_step"], cost["steps"]) for cost in found[:2]] == [(13, 0), (19, 0)]
    assert (found[2]["from_step"], found[2]["steps"]) in [(26, 0), (26, 1)]
    assert {cost["origin"] for cost in found} == {"in memory of 2 ranks"}
    assert "from step 13, in the memory of 2 ranks" in done.stdout


COMMON = (
    *("seed=3", "train.steps=20", "train.global_batch=24", "train.microbatches=4", "train.optimizer.lr=0.003"),
    *("train.optimizer.weight_decay=0.1", "train.schedule.warmup_steps=4", "train.clip_norm=1.0", "train.ema=0.9"),
    *("train.evaluate_every=6", "checkpoint.every=15", "tracking.wandb.mode=disabled"),
)
TRANSFORMER = (
    *("recipe=killed:Transformer", "model.dim=16", "model.feedforward=32", "model.dropout=0.1", "model.vocabulary=24"),
    *("model.layers=4", "data.source=small_transformer:corpus"),
)
GAN = ("recipe=killed:Gan", "model.width=16", "model.latent=8", "train.parts={generator: {every: 2}}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nodes", "ranks", "job"),
    [
        (1, 1, TRANSFORMER),
        (1, 4, TRANSFORMER),
        (1, 2, (*TRANSFORMER, "train.precision=fp16")),
        (1, 4, (*TRANSFORMER, "parallel.strategy=fsdp", "parallel.tensor=2")),
        (2, 2, (*TRANSFORMER, "parallel.strategy=zero2")),  # a node has nothing of some tensors
        (1, 2, (*TRANSFORMER, "parallel.strategy=zero3")),
        (1, 2, (*TRANSFORMER, "parallel.pipeline=2")),
        (1, 2, GAN),
    ],
    ids=["ddp-1", "ddp-4", "fp16", "fsdp-tensor", "zero2", "zero3", "pipeline", "gan"],
)
def test_every_strategy_goes_on_from_memory_to_the_same_bits(
    sandbox: Sandbox, nodes: int, ranks: int, job: tuple[str, ...]
) -> None:
    put(sandbox, [{"rank": ranks - 1, "step": 8, "how": "rank"}], [{"rank": 0, "step": 17, "how": "both"}])
    whole = train_ranks(sandbox.folder, ranks, *COMMON, *job)
    shape = ("--nodes", str(nodes), "--nproc-per-node", str(ranks // nodes))
    done = sandbox.run("launch", *shape, *COMMON, *job, "recovery.snapshot=1", "recovery.max_restarts=2")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (sandbox.folder / "runs").glob("*/0001")
    run = RunFolder(found)
    assert run.steps() == list(range(1, 21))
    assert run.numbers() == whole.numbers()
    whole.export()
    assert run.weights() == whole.weights()
    assert [(cost["from_step"], cost["steps"]) for cost in run.costs()] == [(8, 0), (17, 0)]


def test_a_report_that_cannot_be_kept_does_not_end_the_run(sandbox: Sandbox, reference: RunFolder) -> None:
    put_recipe(sandbox)
    closed = gate(sandbox)
    with sandbox.start(*LAUNCH, *JOB, "recovery.max_restarts=1") as process:
        wait_at_gate(sandbox, process)
        (run_of(sandbox).path / "failures").write_text("in the way of the folder")
        os.kill(sandbox.named("dltrain-rank1")[0], signal.SIGKILL)
        closed.unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "the report could not be kept: " in out
    assert "report: None" not in out
    assert_same_run(run_of(sandbox), reference)
