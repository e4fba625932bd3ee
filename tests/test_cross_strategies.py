"""A checkpoint of any strategy and number of ranks goes on under any other: no number changes, and no bit is lost."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cross import SETUPS, go_on
from dltrain.checkpoint.reader import open_manifest, read_arrays
from dltrain.core.storage import Storage
from ranks import run_ranks, train_ranks

pytestmark = pytest.mark.timeout(900)

COMMON = (
    *("seed=3", "train.steps=20", "train.global_batch=24", "train.microbatches=4", "train.optimizer.lr=0.003"),
    *("train.optimizer.weight_decay=0.1", "train.schedule.warmup_steps=4", "train.clip_norm=1.0", "train.ema=0.9"),
    *("train.evaluate_every=6", "checkpoint.every=10"),
)
TRANSFORMER = (
    *("recipe=transformer", "model.dim=16", "model.feedforward=32", "model.dropout=0.1", "model.vocabulary=24"),
    *("model.layers=4", "data.source=small_transformer:corpus"),
)  # its embedding is its output layer too
GAN = ("recipe=gan", "model.width=16", "model.latent=8", "train.parts={generator: {every: 2}}")
WHOLE = tuple(name for name in SETUPS if "tensor" not in name and "pipeline" not in name)  # which a GAN takes


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Origins:
    return Origins(tmp_path_factory.mktemp("origins"))


class Origins:
    """Uninterrupted runs of 20 steps, trained when first asked for, with a checkpoint of step 10."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.run = cache(self._run)

    def _run(self, job: tuple[str, ...], setup: str) -> tuple[Path, list[dict[str, float]]]:
        """A folder that has the checkpoint of step 10 alone, and the rows of the metrics."""
        folder = self._folder / f"{len(list(self._folder.iterdir()))}"
        folder.mkdir()
        ranks, overrides = SETUPS[setup]
        run = train_ranks(folder, ranks, *COMMON, *job, *overrides)
        shutil.rmtree(run.path / "checkpoints" / "step-00000020")
        return run.path / "checkpoints", run.rows()


def check_all(origins: Origins, folder: Path, job: tuple[str, ...], setup: str, froms: tuple[str, ...]) -> None:
    """Go on under ``setup`` from a checkpoint of each of ``froms``."""
    ranks, overrides = SETUPS[setup]
    folders = {name: str(origins.run(job, name)[0]) for name in froms}
    ended = run_ranks(go_on, ranks, folder, folders, *COMMON, *job, *overrides, timeout=800)
    assert ended == [0] * ranks, "\n".join((folder / f"rank{rank}.log").read_text() for rank in range(ranks))
    _, whole = origins.run(job, "ddp × 1")
    for name, origin in folders.items():
        saved, again = (_bits(Path(path)) for path in (origin, folder / name / "again"))
        assert saved.keys() == again.keys()
        assert [fqn for fqn in saved if not np.array_equal(saved[fqn], again[fqn])] == []
        rows = [json.loads(line) for line in (folder / name / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(11, 21))
        torch.testing.assert_close(_numbers(rows), _numbers(whole[10:]), rtol=1e-5, atol=1e-7)


def _bits(folder: Path) -> dict[str, np.ndarray]:
    storage = Storage(str(folder))
    return read_arrays(storage, open_manifest(storage, 10))


def _numbers(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Losses, rates and gradient norms; what is evaluated is of the averaged weights."""
    kept = ("loss", "lr", "epoch", "accuracy")
    return [{name: value for name, value in row.items() if name.endswith(kept)} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
def test_a_language_model_goes_on_from_every_other(origins: Origins, setup: str, tmp_path: Path) -> None:
    check_all(origins, tmp_path, TRANSFORMER, setup, tuple(SETUPS))


@pytest.mark.slow
@pytest.mark.parametrize("setup", WHOLE)
def test_a_gan_goes_on_from_one_of_every_kind(origins: Origins, setup: str, tmp_path: Path) -> None:
    check_all(origins, tmp_path, GAN, setup, ("ddp × 1", "fsdp × 2", "zero1 × 2", "zero3 × 4"))


@pytest.mark.parametrize(("setup", "other"), [("fsdp × 2", "zero3 × 2"), ("zero1 × 2", "tensor × 2")])
def test_a_language_model_goes_on_from_another(origins: Origins, setup: str, other: str, tmp_path: Path) -> None:
    check_all(origins, tmp_path, TRANSFORMER, setup, (other,))
