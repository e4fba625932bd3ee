"""A convolutional classifier: convolutions, pooling, fully connected layers. The model of the built-in digits job.

dltrain launch recipe=cnn model.widths='[16, 32]'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from ..core.contracts import Batch, Layout
from ..core.job import Spec


class CnnConfig(Spec):
    """Arguments of the CNN (``model:`` in a job file)."""

    channels: int = Field(1, gt=0)
    """Channels of the input images."""
    size: int = Field(8, gt=0)
    """Height and width of the input images in pixels."""
    classes: int = Field(10, gt=1)
    """Number of classes."""
    widths: list[int] = Field(default_factory=lambda: [32, 64], min_length=1)
    """Output channels of the convolutions; each is followed by 2 × 2 max pooling."""
    hidden: int = Field(128, gt=0)
    """Width of the fully connected layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the fully connected layer's outputs dropped in training."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(width < 1 for width in self.widths):
            raise ValueError("widths must be positive")
        if self.size >> len(self.widths) < 1:
            raise ValueError(f"{len(self.widths)} poolings leave nothing of {self.size} × {self.size} pixels")
        return self


class Cnn(nn.Module):
    """``[samples, channels, size, size]`` float images to ``[samples, classes]`` logits."""

    def __init__(self, config: CnnConfig) -> None:
        super().__init__()
        inputs = [config.channels, *config.widths[:-1]]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, kernel_size=3, padding=1) for i, o in zip(inputs, config.widths, strict=True)
        )
        side = config.size >> len(config.widths)
        self.hidden = nn.Linear(config.widths[-1] * side * side, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.logits = nn.Linear(config.hidden, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        for convolution in self.convolutions:
            images = functional.max_pool2d(functional.relu(convolution(images)), 2)
        return self.logits(self.dropout(functional.relu(self.hidden(images.flatten(1)))))


class CnnRecipe:
    """Image classification with cross entropy: batches of ``x`` (float images) and ``y`` (int64 class indices)."""

    Config = CnnConfig

    def __init__(self, **model: object) -> None:
        self.config = self.Config.model_validate(model)

    def parts(self) -> dict[str, nn.Module]:
        return {"cnn": Cnn(self.config)}

    def layout(self, part: str) -> Layout:
        return Layout(
            units=(*(f"convolutions.{i}" for i in range(len(self.config.widths))), "hidden", "logits"),
            tensor={"hidden": "column", "dropout": "dropout", "logits": "row"},
        )

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return functional.cross_entropy(parts[part](batch["x"]), batch["y"])

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        logits = parts["cnn"](batch["x"])
        return {
            "loss": functional.cross_entropy(logits, batch["y"], reduction="none"),
            "accuracy": (logits.argmax(dim=1) == batch["y"]).to(torch.float32),
        }
