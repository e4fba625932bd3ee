"""Recipes whose loss, or gradients, are not finite in one microbatch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import dltrain
import torch
from dltrain.models.cnn import CnnRecipe
from half_recipes import await_checkpoint
from torch import Tensor, nn


class Broken(CnnRecipe):
    """In microbatch 1 of step ``at``: a loss that is not finite, though its gradients are; or gradients, if ``deep``.

    Or the images, and so all that follows, if ``dark``.

    With ``paced`` no step begins before the checkpoint of the one before it is complete.
    """

    def __init__(
        self, at: int = -1, deep: bool = False, dark: bool = False, paced: bool = False, **model: object
    ) -> None:
        super().__init__(**model)
        self.at, self.deep, self.dark, self.paced = at, deep, dark, paced

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        if self.paced and batch.step > 0:
            await_checkpoint(batch.step)
        struck = (batch.step, batch.index) == (self.at, 1)
        if struck and self.dark:
            batch = replace(batch, fields={**batch.fields, "x": torch.full_like(batch["x"], float("nan"))})
        loss = super().loss(part, parts, batch)
        if not struck or self.dark:
            return loss
        return loss + (loss - loss.detach()) * float("inf") * 0 if self.deep else loss + float("inf")
