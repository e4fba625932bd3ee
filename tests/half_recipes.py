"""Recipes whose gradients are made to overflow float16 in one microbatch, or are too small for it."""

from __future__ import annotations

from collections.abc import Mapping

import dltrain
from dltrain.models.cnn import CnnRecipe
from torch import Tensor, nn
from zero_recipes import GanRecipe


class Scaled(CnnRecipe):
    """The CNN with its loss ``times`` as large; in microbatch 1 of step ``at`` float16 does not hold its gradients."""

    def __init__(self, at: int = -1, times: float = 1.0, **model: object) -> None:
        super().__init__(**model)
        self.at, self.times = at, times

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        loss = super().loss(part, parts, batch) * self.times
        return loss * 1e6 if (batch.step, batch.index) == (self.at, 1) else loss


class Gan(GanRecipe):
    """The discriminator's gradients overflow in step 1."""

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        loss = super().loss(part, parts, batch)
        return loss * 1e6 if batch.step == 1 and part == "discriminator" else loss
