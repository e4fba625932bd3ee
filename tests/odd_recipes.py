"""Recipes with complex weights, as networks that work on spectra have, and with sparse gradients."""

from __future__ import annotations

from collections.abc import Mapping

import dltrain
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class _Filter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(8, 5, dtype=torch.complex64))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x.view(-1, 8, 8)) * self.filter
        return self.head(torch.fft.irfft2(spectrum, s=(8, 8)).flatten(1))


class Spectral(dltrain.Recipe):
    def parts(self) -> dict[str, nn.Module]:
        return {"net": _Filter()}

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        return cross_entropy(parts[part](batch["x"]), batch["y"])


class _Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(2 * 64, 10, mode="sum", sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.bag((x.flatten(1) > 0).long() + 2 * torch.arange(64))


class Sparse(Spectral):
    def parts(self) -> dict[str, nn.Module]:
        return {"net": _Bag()}
