"""Users' recipes that a pipeline must not get wrong, and some that it refuses."""

from __future__ import annotations

from collections.abc import Mapping

import dltrain
import torch
from dltrain.core.contracts import Batch, Layout
from torch import Tensor, nn
from torch.nn import functional

CHAIN = ("entry", "between", "second", "between", "norm", "third")


class Entry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 24)

    def forward(self, images: Tensor, *, gain: Tensor) -> Tensor:
        return self.linear(images.flatten(1) * gain)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entry, self.second, self.third = Entry(), nn.Linear(24, 24), nn.Linear(24, 10)
        self.norm = nn.BatchNorm1d(24)
        self.between = nn.Sequential(nn.Tanh(), nn.Dropout(0.2))

    def forward(self, images: Tensor, *, gain: Tensor) -> Tensor:
        return self.third(self.norm(self.between(self.second(self.between(self.entry(images, gain=gain))))))


class Noisy(dltrain.Recipe):
    """Draws before and after it calls its model, also to evaluate; its first layer is frozen."""

    def __init__(self, *, chain: tuple[str, ...] = CHAIN, frozen: bool = True) -> None:
        self.chain, self.frozen = tuple(chain), frozen

    def parts(self) -> dict[str, nn.Module]:
        net = Net()
        net.entry.requires_grad_(not self.frozen)
        return {"net": net}

    def layout(self, part: str) -> Layout:
        return Layout(pipeline=self.chain)

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        x, noise = batch["x"], torch.randn(len(batch["x"]), 10)
        outputs = parts[part](x + 0.1 * torch.randn_like(x), gain=1 + 0.1 * torch.rand(1))
        wanted = functional.one_hot(batch["y"], 10) + 0.1 * noise
        return ((outputs - wanted).square().mean(1) * torch.rand(len(x))).mean()

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        noise = torch.rand(len(batch["x"]))
        right = parts["net"](batch["x"], gain=torch.rand(1)).argmax(1) == batch["y"]
        return {"accuracy": right.float(), "noise": noise, "more": torch.rand(len(noise))}


class Blind(Noisy):
    """Evaluates without its model."""

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        return {"bright": batch["x"].flatten(1).mean(1)}


class Twice(Noisy):
    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return super().loss(part, parts, batch) + super().loss(part, parts, batch)


class Drawing(Noisy):
    def samples(self, parts: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
        return {"none": torch.zeros(1, 1, 2, 2)}
