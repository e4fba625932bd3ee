"""The built-in job as a plain PyTorch loop in one process with one thread: the numbers that ranks must find."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from dltrain.core.job import Split
from dltrain.core.keys import derive
from dltrain.data.order import Order
from dltrain.data.split import split
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, dropout, max_pool2d, relu

SEED, BATCH, MICROBATCHES, EPOCHS, WARMUP, RATE, CLIP = 3, 48, 4, 1.3, 4, 3e-3, 1.0
JOB = (
    *(f"seed={SEED}", f"train.global_batch={BATCH}", f"train.microbatches={MICROBATCHES}", f"train.epochs={EPOCHS}"),
    *(f"train.optimizer.lr={RATE}", "train.optimizer.weight_decay=0.1", f"train.schedule.warmup_steps={WARMUP}"),
    *(f"train.clip_norm={CLIP}", "model.widths=[8, 16]", "model.hidden=24", "model.dropout=0.2"),
    *("data.split.train=0.87", "data.split.val=0", "data.split.test=0.13", "tracking.wandb.mode=disabled"),
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
    parts = split(len(y), Split(train=0.87, val=0, test=0.13))
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
