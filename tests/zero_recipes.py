"""Recipes that are awkward to cut: tied and frozen weights, odd sizes, two parts; and their plain training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import dltrain
import numpy as np
import torch
from dltrain.core.job import Split
from dltrain.core.keys import derive
from dltrain.data.order import Order
from dltrain.data.split import split
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, gelu

SEED, SAMPLES, BATCH, MICROBATCHES, EPOCHS, CLIP, WARMUP = 5, 333, 14, 4, 0.892, 0.7, 3
JOB = (
    *(f"seed={SEED}", f"train.global_batch={BATCH}", f"train.microbatches={MICROBATCHES}", f"train.epochs={EPOCHS}"),
    *(f"train.clip_norm={CLIP}", f"train.schedule.warmup_steps={WARMUP}", "data.source=data.npz"),
    *("data.normalize=false", "data.split.train=1", "data.split.val=0", "data.split.test=0"),
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(13)
        self.up, self.down, self.dropout = nn.Linear(13, 23), nn.Linear(23, 13), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(gelu(self.up(self.norm(x)))))


class Language(nn.Module):
    """A language model of 31 words over 9 places; its places are frozen, its head tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(31, 13)
        self.places = nn.Parameter(torch.randn(9, 13), requires_grad=False)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(13, 31, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        past = (self.words(x) + self.places).cumsum(1) / torch.arange(1, 10).view(-1, 1)
        return self.head(self.blocks(past))


class LanguageRecipe(dltrain.Recipe):
    def parts(self) -> dict[str, nn.Module]:
        return {"lm": Language()}

    def layout(self, part: str) -> dltrain.Layout:
        return dltrain.Layout(units=("blocks.0", "blocks.1"))

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        return cross_entropy(parts[part](batch["x"]).flatten(0, 1), batch["y"].flatten())


class GanRecipe(dltrain.Recipe):
    """A generator of vectors and the discriminator that tells them from real ones."""

    def parts(self) -> dict[str, nn.Module]:
        return {
            "discriminator": nn.Sequential(nn.Linear(6, 11), nn.LeakyReLU(0.2), nn.Linear(11, 1)),
            "generator": nn.Sequential(nn.Linear(3, 9), nn.LeakyReLU(0.2), nn.Linear(9, 6)),
        }

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        real = batch["x"]
        fake = parts["generator"](torch.randn(len(real), 3))
        if part == "generator":
            logits = parts["discriminator"](fake)
            return binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
        logits = parts["discriminator"](torch.cat([real, fake.detach()]))
        truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        return binary_cross_entropy_with_logits(logits, truth)


class NormalizedRecipe(dltrain.Recipe):
    """Regression of vectors with running statistics, which differ from rank to rank."""

    def parts(self) -> dict[str, nn.Module]:
        return {"net": nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 1))}

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        return (parts[part](batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()


def write_data(folder: Path) -> tuple[Tensor, Tensor]:
    """Sentences of words, each followed by one that it partly determines, as ``data.npz``; and the same as tensors."""
    random = np.random.default_rng(1)
    text = random.integers(0, 31, (SAMPLES, 10))
    text[:, 1:] = np.where(random.random((SAMPLES, 9)) < 0.7, (text[:, :-1] * 7 + 3) % 31, text[:, 1:])
    np.savez(folder / "data.npz", x=text[:, :-1], y=text[:, 1:])
    return torch.tensor(text[:, :-1]), torch.tensor(text[:, 1:])


def write_vectors(folder: Path) -> tuple[Tensor, Tensor]:
    """Vectors as ``data.npz``; and the same as tensors."""
    x = np.random.default_rng(2).normal(1.0, 0.3, (SAMPLES, 6)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=np.zeros(SAMPLES, np.int64))
    return torch.tensor(x), torch.zeros(SAMPLES, dtype=torch.int64)


@dataclass
class Plain:
    """What a plain PyTorch loop found: by part, losses and gradient norms of the steps that trained it, and weights."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)


def train_plain(
    recipe: dltrain.Recipe, data: tuple[Tensor, Tensor], optimizers: Mapping[str, tuple[type, dict, int]]
) -> Plain:
    """Train each part with an optimizer of the given type and arguments, in every so many steps."""
    indices = np.asarray(split(SAMPLES, Split(train=1, val=0, test=0))["train"])
    order, total = Order(SAMPLES, SEED), round(EPOCHS * SAMPLES)
    torch.manual_seed(derive(SEED, "weights"))
    modules = recipe.parts()
    built = {
        name: kind([p for p in modules[name].parameters() if p.requires_grad], **options)
        for name, (kind, options, _) in optimizers.items()
    }
    found = Plain({name: [] for name in modules}, {name: [] for name in modules}, modules)
    steps = math.ceil(total / BATCH)
    for step in range(steps):
        picked = indices[order.indices(step * BATCH, min((step + 1) * BATCH, total))]
        progress = (step - WARMUP) / (steps - WARMUP)
        rate = (step + 1) / (WARMUP + 1) if step < WARMUP else 0.5 * (1 + math.cos(math.pi * progress))
        for number, (name, optimizer) in enumerate(built.items()):
            if step % optimizers[name][2]:
                continue
            for module in modules.values():
                module.zero_grad()
            loss = 0.0
            for index, part in enumerate(np.array_split(picked, MICROBATCHES)):
                if len(part):
                    torch.manual_seed(derive(SEED, "step", step, index, number))
                    fields = {"x": data[0][part], "y": data[1][part]}
                    share = (
                        recipe.loss(name, modules, dltrain.Batch(fields, step, index, 1.0)) * len(part) / len(picked)
                    )
                    share.backward()
                    loss += share.item()
            found.losses[name].append(loss)
            found.norms[name].append(nn.utils.clip_grad_norm_(modules[name].parameters(), CLIP).item())
            for group in optimizer.param_groups:
                group["lr"] = optimizers[name][1]["lr"] * rate
            optimizer.step()
    return found
