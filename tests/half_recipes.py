"""Recipes whose gradients are made to overflow float16 in one microbatch, or are too small for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import dltrain
from dltrain.models.cnn import CnnRecipe
from torch import Tensor, nn
from zero_recipes import GanRecipe


class Scaled(CnnRecipe):
    """The CNN with its loss ``times`` as large; in microbatch 1 of step ``at`` float16 does not hold its gradients.

    With ``paced`` no step begins before the checkpoint of the one before it is complete, so that none is skipped.
    """

    def __init__(self, at: int = -1, times: float = 1.0, paced: bool = False, **model: object) -> None:
        super().__init__(**model)
        self.at, self.times, self.paced = at, times, paced

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        if self.paced and batch.step > 0:
            await_checkpoint(batch.step)
        loss = super().loss(part, parts, batch) * self.times
        return loss * 1e6 if (batch.step, batch.index) == (self.at, 1) else loss


def await_checkpoint(step: int) -> None:
    deadline = time.monotonic() + 60
    while not list(Path.cwd().glob(f"runs/*/torchrun/checkpoints/step-{step:08d}/manifest.json")):
        assert time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.005)


class Gan(GanRecipe):
    """The discriminator's gradients overflow in step 1."""

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        loss = super().loss(part, parts, batch)
        return loss * 1e6 if batch.step == 1 and part == "discriminator" else loss
