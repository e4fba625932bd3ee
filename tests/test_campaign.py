"""The chaos campaign: random schedules of faults under every strategy, and each run comes out the same to the bit.

    make test-campaign

plays five schedules under each of ten ways to spread a language model that has dropout, a learning rate that falls, an
average of its weights and accumulated gradients. CI plays a few of one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import Sandbox

COMMON = (
    *("seed=3", "train.steps=120", "train.global_batch=24", "train.microbatches=4", "train.optimizer.lr=0.003"),
    *("train.optimizer.weight_decay=0.1", "train.schedule.name=cosine", "train.schedule.warmup_steps=20"),
    *("train.clip_norm=1.0", "train.ema=0.9", "train.evaluate_every=50"),
    *("checkpoint.every=20", "recovery.stall=2s", "resources.cpus_per_rank=1"),
    *("recipe=transformer", "model.dim=16", "model.feedforward=32", "model.dropout=0.1", "model.vocabulary=24"),
    *("model.layers=2", "data.source=small_transformer:corpus"),
)
SETUPS: dict[str, tuple[str, ...]] = {
    "ddp × 2": ("resources.nproc_per_node=2",),
    "ddp × 4 on 2 nodes": ("resources.nodes=2", "resources.nproc_per_node=2", "train.microbatches=8"),
    "fsdp × 2": ("resources.nodes=2", "parallel.strategy=fsdp"),
    "fsdp × 4": ("resources.nproc_per_node=4", "parallel.strategy=fsdp", "train.microbatches=8"),
    "zero1 × 2": ("resources.nproc_per_node=2", "parallel.strategy=zero1"),
    "zero2 × 2": ("resources.nodes=2", "parallel.strategy=zero2"),
    "zero3 × 2": ("resources.nproc_per_node=2", "parallel.strategy=zero3"),
    "tensor × 2": ("resources.nproc_per_node=2", "parallel.tensor=2"),
    "pipeline × 2": ("resources.nodes=2", "parallel.pipeline=2"),
    "fsdp × 2, tensor × 2": ("resources.nproc_per_node=4", "parallel.strategy=fsdp", "parallel.tensor=2"),
}
SCHEDULES = 5


def play(box: Sandbox, setup: str, *, seed: int, schedules: int) -> None:
    """Play random schedules against a setup; on the way out nothing of them is left."""
    shutil.copy(Path(__file__).with_name("small_transformer.py"), box.folder)
    words = ("--random", str(schedules), "--seed", str(seed), "--json")
    done = box.run("chaos", *COMMON, *SETUPS[setup], *words, timeout=280 if schedules < SCHEDULES else 1700)
    assert done.returncode in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    wrong = {s["schedule"]: (s["faults"], s["wrong"], s["folder"]) for s in answer["schedules"] if s["wrong"]}
    assert not wrong, json.dumps(wrong, indent=2)
    assert answer["identical"] == schedules
    assert sum(schedule["starts"] > 1 for schedule in answer["schedules"]) >= schedules // 2


@pytest.mark.campaign
def test_random_faults_change_nothing(sandbox: Sandbox) -> None:
    play(sandbox, "fsdp × 2", seed=1, schedules=4)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("setup", SETUPS)
def test_random_faults_change_nothing_under_any_strategy(sandbox: Sandbox, setup: str) -> None:
    play(sandbox, setup, seed=100 + list(SETUPS).index(setup), schedules=SCHEDULES)
