"""The same bits, whatever happened on the way: going on from a checkpoint; any number of ranks."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from dltrain.checkpoint.reader import catalogue, open_manifest, read_arrays
from dltrain.core.storage import Storage
from launching import Sandbox
from ranks import train_ranks
from runs import RunFolder
from stage import JOB, assert_same_run, put_recipe, run_of, stop_at

STEPS, MIDDLE, LATE = 12, 4, 8
COMMON = (
    *("seed=3", f"train.steps={STEPS}", "train.global_batch=40", "train.microbatches=8", "train.optimizer.lr=0.003"),
    *("train.optimizer.weight_decay=0.1", "train.schedule.warmup_steps=4", "train.clip_norm=1.0", "train.ema=0.9"),
    *("train.evaluate_every=5", f"checkpoint.every={MIDDLE}", "checkpoint.keep=4"),
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


def begins(folder: Path, job: tuple[str, ...], *, ranks: int) -> RunFolder:
    folder.mkdir()
    return train_ranks(folder, ranks, *COMMON, *job)


def goes_on(folder: Path, job: tuple[str, ...], origin: RunFolder, *, ranks: int, step: int = MIDDLE) -> RunFolder:
    """Train ``job`` to its end in ``folder``, from a checkpoint of ``origin``."""
    checkpoint = Path(f"checkpoints/step-{step:08}")
    shutil.copytree(origin.path / checkpoint, folder / "runs/digits/torchrun" / checkpoint)
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
    whole = begins(tmp_path / "whole", job, ranks=4)
    again = goes_on(tmp_path / "again", job, whole, ranks=4)
    assert again.steps() == list(range(MIDDLE + 1, STEPS + 1))
    assert again.numbers() == whole.numbers()[MIDDLE:]
    assert hashes(again) == hashes(whole)


# ---- numerics: reproducible

REPRODUCIBLE = "numerics=reproducible"


def test_ranks_that_become_fewer_and_more_compute_the_bits_of_one(tmp_path: Path) -> None:
    job = (*CNN, REPRODUCIBLE)
    one = begins(tmp_path / "one", job, ranks=1)
    four = begins(tmp_path / "four", (*job, "parallel.bucket_mb=0.002"), ranks=4)
    assert four.numbers() == one.numbers()
    assert hashes(four) == hashes(one)
    assert one.losses() == pytest.approx(begins(tmp_path / "fast", CNN, ranks=1).losses(), rel=1e-5)
    two = goes_on(tmp_path / "two", job, four, ranks=2)
    again = goes_on(tmp_path / "again", job, two, ranks=4, step=LATE)
    for run, step in ((two, MIDDLE), (again, LATE)):
        assert run.steps() == list(range(step + 1, STEPS + 1))
        assert run.numbers() == one.numbers()[step:]
        assert hashes(run) == hashes(one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "job",
    [
        (*TRANSFORMER, "train.recompute=true", "train.precision=bf16"),
        (*GAN, "train.precision=fp16"),
        (*CNN, "train.microbatches=32", "train.optimizer.name=muon"),
        ("recipe=rnn", "model.cell=gru", "model.hidden=16", "train.global_batch=19"),  # pieces of unlike sizes
    ],
    ids=["transformer", "gan", "cnn", "rnn"],
)
def test_any_number_of_ranks_computes_the_same_bits(tmp_path: Path, job: tuple[str, ...]) -> None:
    one, *others = (begins(tmp_path / str(ranks), (*job, REPRODUCIBLE), ranks=ranks) for ranks in (1, 2, 4, 8))
    for run in others:
        assert run.numbers() == one.numbers()
        assert hashes(run) == hashes(one)


@pytest.mark.slow
def test_a_launch_that_is_stopped_and_continued_on_other_numbers_of_ranks_computes_the_bits_of_one(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    job = (*JOB, REPRODUCIBLE)
    (tmp_path / "one").mkdir()
    box = Sandbox(tmp_path / "one")
    try:
        put_recipe(box)
        assert box.run("launch", *job).returncode == 0
        one = run_of(box)
        put_recipe(sandbox)
        stop_at(sandbox, 10, "launch", "--nodes", "2", "--nproc-per-node", "2", *job, ranks=4)
        stop_at(sandbox, 40, "launch", *job, ranks=1)
        done = sandbox.run("launch", "--nodes", "2", *job)
        assert done.returncode == 0, done.stderr
        assert_same_run(run_of(sandbox), one)
    finally:
        box.close()
