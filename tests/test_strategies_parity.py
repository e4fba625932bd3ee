"""Every strategy against plain PyTorch in one process, written out here: the same losses, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
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
from ranks import train_ranks
from runs import RunFolder
from sklearn.datasets import load_digits
from small_transformer import Transformer, plain_corpus
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, max_pool2d, relu

SEED, BATCH, MICROBATCHES, SAMPLES, WARMUP, RATE, CLIP = 3, 40, 4, 803, 4, 2e-3, 0.8
JOB = (
    *(f"seed={SEED}", f"train.global_batch={BATCH}", f"train.microbatches={MICROBATCHES}", f"train.clip_norm={CLIP}"),
    *(f"train.optimizer.lr={RATE}", "train.optimizer.weight_decay=0.1", f"train.schedule.warmup_steps={WARMUP}"),
)
CNN = ("model.widths=[6, 10]", "model.hidden=24", "model.dropout=0.2")
WORDS = ("recipe=small_transformer:Recipe", "data.source=small_transformer:corpus")


class Net(nn.Module):
    """The network of ``models/cnn.py`` as its documentation describes it, made in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 10, 3, padding=1)])
        self.hidden = nn.Linear(40, 24)
        self.logits = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = max_pool2d(relu(convolution(x)), 2)
        return self.logits(dropout(relu(self.hidden(x.flatten(1))), 0.2, self.training))


class Trained(NamedTuple):
    """What a run came to: the loss of each step, the final weights, and the loss over the test part."""

    losses: list[float]
    weights: dict[str, Tensor]
    test_loss: float


def digits(train: np.ndarray) -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    pixels = images[train] / 16
    x = (torch.tensor(images / 16, dtype=torch.float32) - pixels.mean()) / pixels.std()
    return x.view(-1, 1, 8, 8), torch.tensor(labels)


def train_plainly(build: Callable[[], nn.Module], x: Tensor, y: Tensor, train: np.ndarray, test: np.ndarray) -> Trained:
    """One process, one thread; the last of the steps has fewer samples than the others."""
    torch.manual_seed(derive(SEED, "weights"))
    model = build()
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
            logits = model(x[part]).flatten(0, y.dim() - 1)
            share = cross_entropy(logits, y[part].flatten()) * (len(part) / len(picked))
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
        test_loss = cross_entropy(model(x[test]).flatten(0, y.dim() - 1), y[test].flatten()).item()
    return Trained(losses, model.state_dict(), test_loss)


@cache
def plain(model: str) -> Trained:
    count = len(load_digits().target) if model == "cnn" else len(plain_corpus()[0])
    train, test = (np.asarray(split(count, Split())[part]) for part in ("train", "test"))
    if model == "cnn":
        return train_plainly(Net, *digits(train), train, test)
    return train_plainly(lambda: Transformer(tied=model == "tied"), *plain_corpus(), train, test)


def job(model: str) -> tuple[str, ...]:
    count = len(load_digits().target) if model == "cnn" else len(plain_corpus()[0])
    epochs = SAMPLES / len(split(count, Split())["train"])
    own = {"cnn": CNN, "transformer": WORDS, "tied": (*WORDS, "model.tied=true")}[model]
    return (*JOB, f"train.epochs={epochs!r}", *own)


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


FSDP = "parallel.strategy=fsdp"
FAST = [
    (1,),
    (2,),
    (2, "parallel.static_graph=true"),
    (2, FSDP),
    (2, FSDP, "parallel.reduce=microbatch", "parallel.reshard=false", "train.recompute=true"),
    (2, "parallel.tensor=2"),
]
SLOW = [
    (4,),
    (4, FSDP),
    (4, FSDP, "parallel.replicas=2"),
    (4, FSDP, "parallel.replicas=2", "parallel.reduce=microbatch"),
    (4, "parallel.tensor=2"),
    (4, FSDP, "parallel.tensor=2"),
    (2, "parallel.tensor=2", "train.recompute=true"),
]
CELLS = [
    pytest.param(model, *cell, id=f"{model} {' '.join(map(str, cell))}", marks=[pytest.mark.slow] * slow)
    for slow, cells in ((0, FAST), (1, SLOW))
    for model in ("cnn", "transformer")
    for cell in [(cell[0], cell[1:]) for cell in cells]
]


@pytest.mark.parametrize(("model", "ranks", "strategy"), CELLS)
def test_every_strategy_computes_what_one_plain_process_does(
    tmp_path: Path, model: str, ranks: int, strategy: tuple[str, ...]
) -> None:
    check(train_ranks(tmp_path, ranks, *job(model), *strategy), plain(model))


@pytest.mark.parametrize("strategy", [FSDP, "parallel.tensor=2"])
def test_weights_that_are_used_twice_stay_one(tmp_path: Path, strategy: str) -> None:
    check(train_ranks(tmp_path, 2, *job("tied"), strategy), plain("tied"))


def go_on(folder: Path, model: str, *segments: tuple[int, ...]) -> RunFolder:
    """Four steps under each of ``segments``, from the checkpoint of the one before."""
    constant = ("train.schedule.name=constant", "train.ema=0.9", "train.evaluate_every=4")
    for index, (ranks, *strategy) in enumerate(segments, start=1):
        run = train_ranks(folder, ranks, *job(model), *constant, f"train.steps={4 * index}", *map(str, strategy))
    return run


@pytest.mark.parametrize(
    ("model", "segments"),
    [
        ("cnn", [(1,), (2, FSDP), (2, "parallel.tensor=2"), (1,), (2,)]),
        ("tied", [(2, FSDP), (1,), (2, "parallel.tensor=2"), (2, FSDP), (1,)]),
        pytest.param(
            "transformer",
            [
                *((4, FSDP), (2, "parallel.tensor=2"), (4, FSDP, "parallel.tensor=2"), (2, FSDP)),
                *((4, FSDP, "parallel.replicas=2"), (4, "parallel.tensor=2"), (4, FSDP), (1,)),
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_checkpoint_goes_on_under_any_other_strategy(
    tmp_path: Path, model: str, segments: list[tuple[int, ...]]
) -> None:
    for name in ("changing", "one"):
        (tmp_path / name).mkdir()
    changing = go_on(tmp_path / "changing", model, *segments)
    one = go_on(tmp_path / "one", model, *[(1,)] * len(segments))
    assert len(one.losses()) == 4 * len(segments)
    torch.testing.assert_close(changing.losses(), one.losses(), rtol=1e-5, atol=0)
    for key in ("val/loss", "test/loss"):  # of the averaged weights
        found, wanted = ([row[key] for row in run.rows() if key in row] for run in (changing, one))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    ours, theirs = weights(changing), weights(one)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4)
