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


class Looking(Noisy):
    """Penalises its weights, which are not all on the rank that computes the loss."""

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return super().loss(part, parts, batch) + sum(weight.square().sum() for weight in parts[part].parameters())


class Link(nn.Module):
    def __init__(self, *weights: nn.Parameter) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Linked(dltrain.Recipe):
    """Three stages: the first two share a weight, the last two another."""

    def parts(self) -> dict[str, nn.Module]:
        a, b = (nn.Parameter(torch.randn(64, 64) / 8) for _ in range(2))
        return {"net": nn.Sequential(Link(a), Link(a, b), Link(b))}

    def layout(self, part: str) -> Layout:
        return Layout(pipeline=("0", "1", "2"))

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return functional.cross_entropy(parts[part](batch["x"])[:, :10], batch["y"])

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        return {"loss": functional.cross_entropy(parts["net"](batch["x"])[:, :10], batch["y"], reduction="none")}
