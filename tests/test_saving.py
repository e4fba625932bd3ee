"""Snapshots that are written in the background: by persisters that are killed, to storages that fail, in time."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import State, assert_same, newest
from dltrain.checkpoint.reader import catalogue, open_manifest
from dltrain.core.storage import Storage
from ranks import train_ranks
from runs import RunFolder

MODEL = ("model.widths=[4]", "model.hidden=8", "train.microbatches=2")


def steps(run: RunFolder) -> list[int]:
    return [entry.step for entry in catalogue(Storage(str(run.path / "checkpoints")))]


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path: Path) -> None:
    job = ("train.steps=24", "train.evaluate_every=3", "checkpoint.keep=1", "checkpoint.keep_best=val/accuracy")
    run = train_ranks(tmp_path, 2, *MODEL, *job, "checkpoint.keep_best_goal=max", "train.optimizer.lr=0.02")
    storage = Storage(str(run.path / "checkpoints"))
    kept = steps(run)
    assert kept[0] == 24
    assert len(kept) <= 2
    rated = {step: open_manifest(storage, step).extra["evaluated"] for step in kept}
    values = {row["step"]: row["val/accuracy"] for row in run.rows() if "val/accuracy" in row}
    for step, found in rated.items():
        assert isinstance(found, dict)
        assert found["val/accuracy"] == values[step]


def test_a_checkpoint_is_due_by_the_clock_on_every_rank_at_once(tmp_path: Path) -> None:
    run = train_ranks(tmp_path, 2, *MODEL, "train.steps=300", "checkpoint.every=0.2s", "checkpoint.keep=99")
    found = steps(run)
    assert found[0] == 300
    assert len(found) > 1  # each of one step, or there would be no manifest
