"""The same bits, whatever happened on the way: a run that goes on from a checkpoint, under every strategy."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from dltrain.checkpoint.reader import catalogue, open_manifest, read_arrays
from dltrain.core.storage import Storage
from ranks import train_ranks
from runs import RunFolder

STEPS, MIDDLE = 12, 6
COMMON = (
    *("seed=3", f"train.steps={STEPS}", "train.global_batch=40", "train.microbatches=8", "train.optimizer.lr=0.003"),
    *("train.optimizer.weight_decay=0.1", "train.schedule.warmup_steps=4", "train.clip_norm=1.0", "train.ema=0.9"),
    *("train.evaluate_every=5", f"checkpoint.every={MIDDLE}"),
)
CNN = ("model.widths=[6, 10]", "model.hidden=24", "model.dropout=0.2", "model.norm=batch")
TRANSFORMER = (
    *("recipe=transformer", "model.dim=16", "model.feedforward=32", "model.dropout=0.1", "model.vocabulary=24"),
    *("model.layers=4", "data.source=small_transformer:corpus"),
)  # its embedding is its output layer too
GAN = ("recipe=gan", "model.width=16", "model.latent=8", "train.parts={generator: {every: 2}}")


def hashes(run: RunFolder) -> dict[str, str]:
    """SHA-256 of every tensor in the newest checkpoint: weights, buffers, averages, the optimizer's state."""
    storage = Storage(str(run.path / "checkpoints"))
    tensors = read_arrays(storage, open_manifest(storage, catalogue(storage)[0].step))
    return {name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in tensors.items()}


def runs_on(folder: Path, job: tuple[str, ...], origin: RunFolder, *, ranks: int) -> RunFolder:
    """Train ``job`` to its end in ``folder``, from the checkpoint in the middle of ``origin``."""
    folder.mkdir()
    middle = Path(f"checkpoints/step-{MIDDLE:08}")
    shutil.copytree(origin.path / middle, folder / "runs/digits/torchrun" / middle)
    return train_ranks(folder, ranks, *COMMON, *job)


@pytest.mark.parametrize(
    ("job", "strategy"),
    [
        (CNN, "strategy=ddp"),
        *(
            pytest.param(job, strategy, marks=pytest.mark.slow)
            for job, strategies in (
                (CNN, ("strategy=fsdp", "tensor=2", "pipeline=2")),
                (TRANSFORMER, ("strategy=zero1", "strategy=zero2", "strategy=zero3", "tensor=2", "pipeline=2")),
                (GAN, ("strategy=ddp", "strategy=fsdp", "strategy=zero2")),
            )
            for strategy in strategies
        ),
    ],
)
def test_a_run_that_goes_on_from_a_checkpoint_computes_the_same_bits(
    tmp_path: Path, job: tuple[str, ...], strategy: str
) -> None:
    job = (*job, f"parallel.{strategy}")
    (tmp_path / "whole").mkdir()
    whole = train_ranks(tmp_path / "whole", 4, *COMMON, *job)
    again = runs_on(tmp_path / "again", job, whole, ranks=4)
    assert again.steps() == list(range(MIDDLE + 1, STEPS + 1))
    assert again.numbers() == whole.numbers()[MIDDLE:]
    assert hashes(again) == hashes(whole)
