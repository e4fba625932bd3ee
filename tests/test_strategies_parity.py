"""A user's transformer under every strategy against plain PyTorch, written out here; checkpoints across strategies.

The built-in models are held to the same in test_parity.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from dltrain.checkpoint.reader import catalogue, open_manifest, read
from dltrain.core.job import Split
from dltrain.core.keys import derive
from dltrain.core.storage import Storage
from dltrain.data.order import Order
from dltrain.data.split import split
from held import say_what_is_held
from ranks import run_ranks, train_ranks
from runs import RunFolder
from small_transformer import Transformer, plain_corpus
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SEED, BATCH, MICROBATCHES, SAMPLES, WARMUP, RATE, CLIP = 3, 40, 4, 803, 4, 2e-3, 0.8
JOB = (
    *(f"seed={SEED}", f"train.global_batch={BATCH}", f"train.microbatches={MICROBATCHES}", f"train.clip_norm={CLIP}"),
    *(f"train.optimizer.lr={RATE}", "train.optimizer.weight_decay=0.1", f"train.schedule.warmup_steps={WARMUP}"),
)
CNN = ("model.widths=[6, 10]", "model.hidden=24", "model.dropout=0.2")
WORDS = (
    *("recipe=small_transformer:Recipe", "data.source=small_transformer:corpus"),
    f"train.epochs={SAMPLES / len(split(len(plain_corpus()[0]), Split())['train'])!r}",
)


class Trained(NamedTuple):
    """What a run came to: the loss of each step, the final weights, and the loss over the test part."""

    losses: list[float]
    weights: dict[str, Tensor]
    test_loss: float


@cache
def plain(*, tied: bool) -> Trained:
    """One process, one thread; the last of the steps has fewer samples than microbatches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _trained(tied=tied)
    finally:
        torch.set_num_threads(threads)


def _trained(*, tied: bool) -> Trained:
    x, y = plain_corpus()
    train, test = (np.asarray(split(len(x), Split())[part]) for part in ("train", "test"))
    torch.manual_seed(derive(SEED, "weights"))
    model = Transformer(tied=tied)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) is many] for many in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}])
    order, steps = Order(len(train), SEED), math.ceil(SAMPLES / BATCH)
    losses: list[float] = []
    for step in range(steps):
        picked = train[order.indices(step * BATCH, min((step + 1) * BATCH, SAMPLES))]
        optimizer.zero_grad()
        loss = 0.0
        for index, part in enumerate(np.array_split(picked, min(MICROBATCHES, len(picked)))):
            torch.manual_seed(derive(SEED, "step", step, index, 0))
            share = cross_entropy(model(x[part]).flatten(0, 1), y[part].flatten()) * (len(part) / len(picked))
            share.backward()
            loss += share.item()
        losses.append(loss)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        progress = (step - WARMUP) / (steps - WARMUP)
        rate = RATE * (step + 1) / (WARMUP + 1) if step < WARMUP else RATE * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    model.eval()
    with torch.no_grad():
        test_loss = cross_entropy(model(x[test]).flatten(0, 1), y[test].flatten()).item()
    return Trained(losses, model.state_dict(), test_loss)


def weights(run: RunFolder) -> dict[str, Tensor]:
    """The weights of the newest checkpoint."""
    storage = Storage(str(run.path / "checkpoints"))
    tensors = read(storage, open_manifest(storage, catalogue(storage)[0].step))
    return {name.split(".", 2)[2]: value for name, value in tensors.items() if name.startswith("model.")}


def check(run: RunFolder, reference: Trained) -> None:
    torch.testing.assert_close(run.losses(), reference.losses, rtol=1e-5, atol=0)
    assert run.rows()[-1]["test/loss"] == pytest.approx(reference.test_loss, rel=1e-4)
    found = weights(run)
    assert found.keys() == reference.weights.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, reference.weights[name], rtol=1e-4, atol=1e-4)


FSDP, PIPELINE = "parallel.strategy=fsdp", "parallel.pipeline=2"
INTERLEAVED = (PIPELINE, "parallel.pipeline_schedule=interleaved")
FAST = [
    (2,),
    (2, FSDP),
    (2, FSDP, "parallel.reduce=microbatch", "parallel.reshard=false", "train.recompute=true"),
    (2, "parallel.tensor=2", "parallel.sequence=true"),
    (2, *INTERLEAVED, "train.recompute=true"),
]
SLOW = [
    (1,),
    (2, "parallel.tensor=2"),
    (4,),
    (4, FSDP),
    (4, FSDP, "parallel.replicas=2"),
    (4, FSDP, "parallel.replicas=2", "parallel.reduce=microbatch"),
    (4, "parallel.tensor=2"),
    (4, FSDP, "parallel.tensor=2"),
    (4, FSDP, "parallel.tensor=2", "parallel.sequence=true"),
    (2, "parallel.tensor=2", "train.recompute=true"),
    (2, PIPELINE),
    (4, "parallel.pipeline=4"),
    (4, PIPELINE),
    (4, FSDP, PIPELINE, "parallel.reshard=false"),
    (4, FSDP, *INTERLEAVED, "parallel.reduce=microbatch"),
    (4, PIPELINE, "parallel.tensor=2", "parallel.sequence=true", "train.recompute=true"),
]
CELLS = [
    pytest.param(cell[0], cell[1:], id=" ".join(map(str, cell)), marks=[pytest.mark.slow] * slow)
    for slow, cells in ((0, FAST), (1, SLOW))
    for cell in cells
]


@pytest.mark.parametrize(("ranks", "strategy"), CELLS)
def test_every_strategy_computes_what_one_plain_process_does(
    tmp_path: Path, ranks: int, strategy: tuple[str, ...]
) -> None:
    check(train_ranks(tmp_path, ranks, *JOB, *WORDS, *strategy), plain(tied=False))


@pytest.mark.parametrize("strategy", [FSDP, "parallel.tensor=2", PIPELINE])
def test_weights_that_are_used_twice_stay_one(tmp_path: Path, strategy: str) -> None:
    check(train_ranks(tmp_path, 2, *JOB, *WORDS, "model.tied=true", strategy), plain(tied=True))


def test_a_sequence_that_the_ranks_cannot_share_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a sequence of 11 cannot be shared evenly by 2 ranks"):
        train_ranks(tmp_path, 2, *WORDS, "data.options={length: 11}", "parallel.tensor=2", "parallel.sequence=true")


def test_bf16_rounds_the_same_and_keeps_weights_in_float32(tmp_path: Path) -> None:
    runs: list[RunFolder] = []
    for name, strategy in (("ddp", ()), ("fsdp", (FSDP,))):
        (tmp_path / name).mkdir()
        runs.append(train_ranks(tmp_path / name, 2, *JOB, *WORDS, "train.precision=bf16", *strategy))
    ddp, fsdp = (run.losses() for run in runs)
    torch.testing.assert_close(fsdp, ddp, rtol=3e-3, atol=0)
    assert ddp != pytest.approx(plain(tied=False).losses, rel=1e-5)
    assert {value.dtype for value in weights(runs[1]).values()} == {torch.float32}


def go_on(folder: Path, model: tuple[str, ...], segments: Sequence[tuple[int | str, ...]]) -> RunFolder:
    """Four steps under each of ``segments``, from the checkpoint of the one before."""
    folder.mkdir()
    job = (*JOB, *model, "train.schedule.name=constant", "train.ema=0.9", "train.evaluate_every=4")
    for index, (ranks, *strategy) in enumerate(segments, start=1):
        run = train_ranks(folder, int(ranks), *job, f"train.steps={4 * index}", *map(str, strategy))
    return run


@pytest.mark.parametrize(
    ("model", "segments"),
    [
        (CNN, [(1,), (2, FSDP), (2, "parallel.tensor=2"), (1,)]),
        ((*WORDS, "model.tied=true"), [(2, FSDP), (2,), (2, "parallel.tensor=2"), (2, FSDP)]),
        ((*WORDS, "model.tied=true"), [(2, PIPELINE), (2, FSDP), (2, *INTERLEAVED), (1,)]),
        pytest.param(
            WORDS,
            [
                *((4, FSDP), (2, "parallel.tensor=2"), (4, FSDP, "parallel.tensor=2"), (2, FSDP)),
                *((4, FSDP, "parallel.replicas=2"), (4, "parallel.tensor=2"), (4, FSDP, PIPELINE), (1,)),
                *((4, PIPELINE, "parallel.tensor=2"), (4, PIPELINE), (4, "parallel.pipeline=4"), (2, FSDP)),
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_checkpoint_goes_on_under_any_other_strategy(
    tmp_path: Path, model: tuple[str, ...], segments: Sequence[tuple[int | str, ...]]
) -> None:
    changing = go_on(tmp_path / "changing", model, segments)
    one = go_on(tmp_path / "one", model, [(1,)] * len(segments))
    assert len(one.losses()) == 4 * len(segments)
    torch.testing.assert_close(changing.losses(), one.losses(), rtol=1e-5, atol=0)
    for key in ("val/loss", "test/loss"):  # of the averaged weights
        found, wanted = ([row[key] for row in run.rows() if key in row] for run in (changing, one))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    ours, theirs = weights(changing), weights(one)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "share"), [((), 1.0), ((FSDP,), 0.5), (("parallel.tensor=2",), 0.5), ((FSDP, "train.ema=0.9"), 0.5)]
)
def test_a_rank_holds_and_loads_its_share_only(tmp_path: Path, strategy: tuple[str, ...], share: float) -> None:
    job = ("model.widths=[8]", "model.hidden=256")
    assert run_ranks(say_what_is_held, 2, tmp_path, *job, *strategy) == [0, 0]
    for rank in (0, 1):
        said = json.loads((tmp_path / f"rank{rank}.log").read_text())
        assert said["held"] == pytest.approx(share * said["whole"], rel=0.02)
