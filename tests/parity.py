"""Every built-in model under every strategy against a plain loop: the cells, and one cell's measurement."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from dltrain.checkpoint.reader import catalogue, open_manifest, read
from dltrain.core.config import load_job
from dltrain.core.storage import Storage
from plain import Trained, train_plainly
from ranks import train_ranks
from torch import Tensor

_COMMON = (
    *("seed=3", "train.steps=24", "train.global_batch=24", "train.microbatches=4", "train.optimizer.lr=0.003"),
    *("train.optimizer.weight_decay=0.1", "train.schedule.warmup_steps=4", "train.clip_norm=1.0"),
    *("data.split.train=0.9", "data.split.val=0", "data.split.test=0.1"),
)
JOBS: dict[str, tuple[str, ...]] = {
    "cnn": ("recipe=cnn", "model.widths=[8, 16]", "model.hidden=24", "model.dropout=0.2"),
    "gan": ("recipe=gan", "model.width=16", "model.latent=8"),
    "lstm": ("recipe=rnn", "model.cell=lstm", "model.hidden=16", "model.layers=2", "model.dropout=0.2"),
    "gru, forecasting": (
        *("recipe=rnn", "model.task=forecast", "model.cell=gru", "model.inputs=1", "model.hidden=16", "model.loss=l1"),
        *("model.horizon=8", "model.offset=4.9", "model.scale=6", "data.source=digits_scan"),
    ),
    "transformer": (
        *("recipe=transformer", "model.dim=16", "model.feedforward=32", "model.dropout=0.1", "model.vocabulary=24"),
        "data.source=small_transformer:corpus",
    ),
    "encoder": (
        *("recipe=transformer", "model.task=classify", "model.inputs=8", "model.dim=16", "model.feedforward=32"),
        "model.dropout=0.1",
    ),
    "mlp": ("recipe=mlp", "model.hidden=[16, 16]", "data.source=iris"),
    "gan, wasserstein": ("recipe=gan", "model.width=16", "model.latent=8", "model.loss=wasserstein"),
}


@dataclass(frozen=True)
class Cell:
    """One way to spread a job.

    Attributes:
        name: as the table shows it.
        ranks: the number of processes.
        parallel: the job's overrides.
        jobs: those that it takes.
    """

    name: str
    ranks: int
    parallel: tuple[str, ...] = ()
    jobs: tuple[str, ...] = tuple(JOBS)


_FSDP, _TENSOR = "parallel.strategy=fsdp", "parallel.tensor=2"
_SIMPLE = tuple(job for job in JOBS if job != "gan, wasserstein")  # which differentiates through gradients
_CUT = ("cnn", "transformer", "encoder")  # have rules for tensor parallelism
_CHAINS = (*_CUT, "mlp")  # name what runs one after another
_PIPELINE, _LOOP = "parallel.pipeline=2", "parallel.pipeline_schedule=interleaved"
CELLS = (
    Cell("one process", 1),
    Cell("ddp × 2", 2),
    Cell("ddp × 2, static graph", 2, ("parallel.static_graph=true",), _SIMPLE),
    Cell("ddp × 4", 4),
    Cell("fsdp × 2", 2, (_FSDP,), _SIMPLE),
    Cell("fsdp × 2, reduced in every microbatch", 2, (_FSDP, "parallel.reduce=microbatch"), _SIMPLE),
    Cell("fsdp × 4", 4, (_FSDP,), _SIMPLE),
    Cell("fsdp × 2 in 2 replicas", 4, (_FSDP, "parallel.replicas=2"), _SIMPLE),
    Cell("tensor × 2", 2, (_TENSOR,), _CUT),
    Cell("tensor × 2 with the sequence", 2, (_TENSOR, "parallel.sequence=true"), ("transformer",)),
    Cell("ddp × 2, tensor × 2", 4, (_TENSOR,), _CUT),
    Cell("fsdp × 2, tensor × 2", 4, (_FSDP, _TENSOR), _CUT),
    Cell("fsdp × 2, tensor × 2 with the sequence", 4, (_FSDP, _TENSOR, "parallel.sequence=true"), ("transformer",)),
    Cell("pipeline × 2", 2, (_PIPELINE,), _CHAINS),
    Cell("pipeline × 2, gpipe", 2, (_PIPELINE, "parallel.pipeline_schedule=gpipe"), ("transformer",)),
    Cell("pipeline × 2, interleaved", 2, (_PIPELINE, _LOOP), _CUT),  # the MLP has three layers with weights
    Cell("pipeline × 4", 4, ("parallel.pipeline=4",), _CUT),
    Cell("ddp × 2, pipeline × 2", 4, (_PIPELINE,), _CHAINS),
    Cell("fsdp × 2, pipeline × 2", 4, (_FSDP, _PIPELINE), _CHAINS),
    Cell("fsdp × 2, pipeline × 2, interleaved", 4, (_FSDP, _PIPELINE, _LOOP), ("transformer",)),
    Cell("tensor × 2, pipeline × 2", 4, (_TENSOR, _PIPELINE), _CUT),
    Cell(
        "tensor × 2 with the sequence, pipeline × 2",
        *(4, (_TENSOR, "parallel.sequence=true", _PIPELINE), ("transformer",)),
    ),
    Cell("fsdp × 2, tensor × 2, pipeline × 2", 8, (_FSDP, _TENSOR, _PIPELINE), ("transformer",)),
    *(
        Cell(f"zero{stage} × {ranks}", ranks, (f"parallel.strategy=zero{stage}",), _SIMPLE)
        for stage in (1, 2, 3)
        for ranks in (2, 4)
    ),
)


@dataclass(frozen=True)
class Difference:
    """Largest differences from the plain loop: of losses and gradient norms (relative), and of final weights."""

    loss: float
    norm: float
    weight: float


@cache
def reference(job: str) -> Trained:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_plainly(load_job(None, (*_COMMON, *JOBS[job]), {}, {}).job)
    finally:
        torch.set_num_threads(threads)


def measure(job: str, cell: Cell, folder: Path) -> Difference:
    """Train ``job`` as ``cell`` says, in ``folder``, and compare every step with the plain loop."""
    run = train_ranks(folder, cell.ranks, *_COMMON, *JOBS[job], *cell.parallel)
    expected = reference(job)
    alone = len(expected.losses) == 1
    rows = run.rows()
    assert len(rows) == len(next(iter(expected.losses.values())))

    def worst(figures: dict[str, list[float]], name: str) -> float:
        return max(
            abs(row[f"train/{name}" if alone else f"train/{part}/{name}"] - value) / max(abs(value), 1e-2)
            for part, values in figures.items()
            for row, value in zip(rows, values, strict=True)
        )

    weights = _weights(run.path)
    assert weights.keys() == expected.weights.keys()
    apart = max(float((weights[name] - value).abs().max()) for name, value in expected.weights.items())
    return Difference(worst(expected.losses, "loss"), worst(expected.norms, "grad_norm"), apart)


def _weights(run: Path) -> dict[str, Tensor]:
    storage = Storage(str(run / "checkpoints"))
    found: dict[str, Any] = read(storage, open_manifest(storage, catalogue(storage)[0].step))
    return {name.removeprefix("model."): value for name, value in found.items() if name.startswith("model.")}
