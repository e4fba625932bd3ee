"""A decoder-only language model of a few thousand weights, and a corpus for it: a user's recipe, for the tests."""

from __future__ import annotations

from collections.abc import Mapping

import dltrain
import numpy as np
import torch
from dltrain.core.contracts import Batch, Layout
from torch import Tensor, nn
from torch.nn import functional

WORDS = 24
CHAIN = ("embedding", "blocks.0", "blocks.1", "norm", "head")


def corpus(length: int = 12) -> dict[str, np.ndarray]:
    """Sequences in which each word mostly decides the next."""
    draw = np.random.default_rng(7)
    words = draw.integers(WORDS, size=(400, length + 1))
    for place in range(length):
        follows = (5 * words[:, place] + 3) % WORDS
        words[:, place + 1] = np.where(draw.random(400) < 0.8, follows, words[:, place + 1])
    return {"x": words[:, :-1], "y": words[:, 1:]}


class Attention(nn.Module):
    """Causal, with groups of query heads that share a key and a value; as many heads as its matrices have room for."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, groups * self.size, bias=False)
        self.v, self.o = nn.Linear(width, groups * self.size, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.size)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.drop, self.down = nn.Dropout(0.1), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(functional.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, groups)
        self.norm2, self.mlp, self.drop = nn.LayerNorm(width), Mlp(width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.blocks = nn.Sequential(*(Block(16, heads=4, groups=2) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(words))))


class Recipe(dltrain.Recipe):
    """``unit`` and ``row`` are names to add to the layout, ``chain`` is its pipeline."""

    def __init__(
        self,
        *,
        tied: bool = False,
        unit: str = "blocks.1",
        row: str = "blocks.*.mlp.down",
        chain: tuple[str, ...] = CHAIN,
    ) -> None:
        self.tied, self.unit, self.row, self.chain = tied, unit, row, tuple(chain)

    def parts(self) -> dict[str, nn.Module]:
        return {"net": Transformer(tied=self.tied)}

    def layout(self, part: str) -> Layout:
        attention = {f"blocks.*.attention.{name}": "column" for name in "qkv"}
        mlp = {"blocks.*.mlp.gate": "column", "blocks.*.mlp.up": "column", "blocks.*.mlp.drop": "dropout"}
        rows = {"blocks.*.attention.o": "row", "blocks.*.mlp.down": "row", self.row: "row"}
        ends = {"embedding": "embedding", "head": "whole_column"}
        return Layout(
            units=("blocks.0", self.unit),
            tensor=attention | mlp | rows | ends,
            sequence={"blocks.*.norm1": "norm", "blocks.*.norm2": "norm", "norm": "norm", "blocks.*.drop": "dropout"},
            tensor_sizes={"groups of heads": 2},
            pipeline=self.chain,
        )

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return functional.cross_entropy(parts[part](batch["x"]).flatten(0, 1), batch["y"].flatten())

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        logits = parts["net"](batch["x"])
        return {"loss": functional.cross_entropy(logits.transpose(1, 2), batch["y"], reduction="none").mean(1)}


def plain_corpus() -> tuple[Tensor, Tensor]:
    words = corpus()
    return torch.tensor(words["x"]), torch.tensor(words["y"])
