"""The built-in job against a plain PyTorch loop written out here: the same numbers on any number of ranks."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from dltrain.core.job import Split
from dltrain.core.keys import derive
from dltrain.data.order import Order
from dltrain.data.split import split
from launching import Sandbox
from runs import RunFolder
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, dropout, max_pool2d, relu

SEED, BATCH, MICROBATCHES, EPOCHS, WARMUP, RATE, CLIP = 3, 48, 4, 1.3, 4, 3e-3, 1.0
JOB = (
    *(f"seed={SEED}", f"train.global_batch={BATCH}", f"train.microbatches={MICROBATCHES}", f"train.epochs={EPOCHS}"),
    *(f"train.optimizer.lr={RATE}", "train.optimizer.weight_decay=0.1", f"train.schedule.warmup_steps={WARMUP}"),
    *(f"train.clip_norm={CLIP}", "model.widths=[8, 16]", "model.hidden=24", "model.dropout=0.2"),
    *("data.split.train=0.8", "data.split.val=0", "data.split.test=0.2", "tracking.wandb.mode=disabled"),
)


class Net(nn.Module):
    """The network of ``models/cnn.py`` as its documentation describes it, made in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)])
        self.hidden = nn.Linear(64, 24)
        self.logits = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution in self.convolutions:
            x = max_pool2d(relu(convolution(x)), 2)
        return self.logits(dropout(relu(self.hidden(x.flatten(1))), 0.2, self.training))


@cache
def plain() -> tuple[list[float], list[float], dict[str, torch.Tensor], float]:
    """Losses and gradient norms of every step, final weights, and test accuracy, from one process with one thread."""
    images, labels = load_digits(return_X_y=True)
    y = torch.tensor(labels)
    parts = split(len(y), Split(train=0.8, val=0, test=0.2))
    train, test = (np.asarray(parts[name])[...] for name in ("train", "test"))
    pixels = images[train] / 16
    x = ((torch.tensor(images / 16, dtype=torch.float32) - pixels.mean()) / pixels.std()).view(-1, 1, 8, 8)
    torch.manual_seed(derive(SEED, "weights"))
    model = Net()
    kernels, biases = ([p for p in model.parameters() if (p.dim() > 1) is many] for many in (True, False))
    optimizer = torch.optim.AdamW([{"params": kernels, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0}])
    order = Order(len(train), SEED)
    total = round(EPOCHS * len(train))
    steps = math.ceil(total / BATCH)
    losses: list[float] = []
    norms: list[float] = []
    for step in range(steps):
        stop = min((step + 1) * BATCH, total)
        picked = train[order.indices(step * BATCH, stop)]
        optimizer.zero_grad()
        loss = 0.0
        for index, part in enumerate(np.array_split(picked, MICROBATCHES)):
            torch.manual_seed(derive(SEED, "step", step, index, 0))
            share = cross_entropy(model(x[part]), y[part], reduction="sum") / len(picked)
            share.backward()
            loss += share.item()
        losses.append(loss)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        progress = (step - WARMUP) / (steps - WARMUP)
        rate = RATE * (step + 1) / (WARMUP + 1) if step < WARMUP else RATE * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    model.eval()
    right = (model(x[test]).argmax(1) == y[test]).double().mean().item()
    return losses, norms, model.state_dict(), right


def check(run: RunFolder, weights: Path) -> None:
    losses, norms, state, accuracy = plain()
    rows = run.rows()
    assert len(rows) == len(losses)
    torch.testing.assert_close([r["train/loss"] for r in rows], losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([r["train/grad_norm"] for r in rows], norms, rtol=1e-3, atol=1e-4)
    assert rows[-1]["test/accuracy"] == pytest.approx(accuracy, abs=0.003)  # one sample of 360 may sit on the fence
    trained = load_file(weights)
    assert trained.keys() == state.keys()
    for name, value in trained.items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-4)


def test_any_number_of_ranks_computes_what_one_plain_process_does(sandbox: Sandbox) -> None:
    two = ("--nproc-per-node", "2")
    for ranks in (("--nproc-per-node", "1"), two, ("--nodes", "2", *two), (*two, "parallel.strategy=fsdp")):
        done = sandbox.run("launch", *ranks, "--resume", "never", *JOB)
        assert done.returncode == 0, done.stderr
        run = RunFolder((sandbox.folder / "runs/digits/latest").resolve())
        check(run, run.path / "weights.safetensors")


def test_the_rank_program_gives_the_same_bits_under_torchrun(sandbox: Sandbox) -> None:
    for _ in range(2):
        done = sandbox.run("launch", "--nproc-per-node", "2", "--resume", "never", *JOB)
        assert done.returncode == 0, done.stderr
    command = ("--standalone", "--log-dir", "elastic", "--nproc-per-node", "2", "-m", "dltrain.training.worker", *JOB)
    done = sandbox.run(*command, command="torchrun", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    first, again, torchrun = (RunFolder(sandbox.folder / "runs/digits" / name) for name in ("0001", "0002", "torchrun"))
    assert first.numbers() == again.numbers() == torchrun.numbers()
    assert first.weights() == again.weights()


NORMALIZED = """
    import os
    import dltrain
    from torch import nn
    from torch.nn import functional

    class Normalized(dltrain.Recipe):
        def parts(self):
            return {"net": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))}
        def loss(self, part, parts, batch):
            return functional.cross_entropy(parts[part](batch["x"]), batch["y"])
        def metrics(self, parts, batch):
            with open(f"evaluated-{os.environ['RANK']}", "a") as file:
                print(parts["net"][1].running_mean.tolist(), parts["net"][1].running_var.tolist(), file=file)
            return {"accuracy": (parts["net"](batch["x"]).argmax(1) == batch["y"]).float()}
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_running_statistics_are_rank_0s_when_evaluated_and_saved(sandbox: Sandbox, strategy: str) -> None:
    (sandbox.folder / "normalized.py").write_text(dedent(NORMALIZED), encoding="utf-8")
    job = ("recipe=normalized:Normalized", "train.steps=6", "train.evaluate_every=3", "tracking.wandb.mode=disabled")
    job += (f"parallel.strategy={strategy}",)
    done = sandbox.run("launch", "--nproc-per-node", "2", *job)
    assert done.returncode == 0, done.stderr
    zero, one = (set((sandbox.folder / f"evaluated-{rank}").read_text().splitlines()) for rank in (0, 1))
    assert zero == one
    assert len(zero) == 2
    saved = load_file(sandbox.folder / "runs/digits/latest/weights.safetensors")
    assert f"{saved['1.running_mean'].tolist()} {saved['1.running_var'].tolist()}" in zero
