"""A convolutional classifier: convolutions, pooling, fully connected layers. The model of the built-in digits job.

dltrain launch recipe=cnn model.widths='[16, 32]' model.residual=true model.norm=group
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from ..core.contracts import Batch, Layout
from ..core.spec import Spec
from .losses import cross_entropy
from .normalization import BatchNormKind, NormKind, norm2d


class CnnConfig(Spec):
    """Arguments of the CNN (``model:`` in a job file)."""

    channels: int = Field(1, gt=0)
    """Channels of the input images."""
    size: int = Field(8, gt=0)
    """Height and width of the input images in pixels."""
    classes: int = Field(10, gt=1)
    """Number of classes."""
    widths: list[int] = Field(default_factory=lambda: [32, 64], min_length=1)
    """Output channels of the stages; each is followed by 2 × 2 max pooling."""
    residual: bool = False
    """Make each stage a block of two convolutions with a shortcut around them, instead of one convolution."""
    norm: NormKind = "none"
    """Normalise after each convolution: over groups of channels of one sample, or over the samples of a batch."""
    groups: int = Field(8, gt=0)
    """Groups of channels that norm 'group' makes; every width must be a multiple."""
    batch_norm: BatchNormKind = "microbatch"
    """Whose statistics norm 'batch' takes in training. 'microbatch': of each microbatch alone, so the losses depend on
    train.microbatches, not on the number of ranks. 'synchronised': of the microbatches that all ranks compute at the
    same time; with train.microbatches 'auto', and no pipeline, that is the whole global batch, on any number of ranks.
    Evaluation uses the running averages of rank 0, or of the first rank of the stage."""
    hidden: int = Field(128, gt=0)
    """Width of the fully connected layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the fully connected layer's outputs dropped in training."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Probability that the targets spread evenly over all classes."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(width < 1 for width in self.widths):
            raise ValueError("widths must be positive")
        if self.size >> len(self.widths) < 1:
            raise ValueError(f"{len(self.widths)} poolings leave nothing of {self.size} × {self.size} pixels")
        if self.norm == "group" and any(width % self.groups for width in self.widths):
            raise ValueError(f"widths must be multiples of the {self.groups} groups of norm 'group'")
        for key, norm in (("groups", "group"), ("batch_norm", "batch")):
            if key in self.model_fields_set and self.norm != norm:
                raise ValueError(f"'{key}' is of use to norm '{norm}' only, not to '{self.norm}'")
        return self


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut (He et al. 2016), before the last activation.

    ``[samples, inputs, height, width]`` to ``[samples, outputs, height, width]``. The shortcut is the identity, or a
    1 × 1 convolution where the number of channels changes.
    """

    def __init__(self, inputs: int, outputs: int, config: CnnConfig) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, config)
        self.second = _convolution(outputs, outputs, config)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.shortcut(images) + self.second(functional.relu(self.first(images)))


def _convolution(inputs: int, outputs: int, config: CnnConfig) -> nn.Module:
    if config.norm == "none":
        return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
    norm = norm2d(outputs, kind=config.norm, groups=config.groups, batch_norm=config.batch_norm)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False), norm)


class Cnn(nn.Module):
    """``[samples, channels, size, size]`` float images to ``[samples, classes]`` logits."""

    def __init__(self, config: CnnConfig) -> None:
        super().__init__()
        stage = ResidualBlock if config.residual else _convolution
        inputs = [config.channels, *config.widths[:-1]]
        self.convolutions = nn.ModuleList(stage(i, o, config) for i, o in zip(inputs, config.widths, strict=True))
        self.pooling = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
        self.flatten = nn.Flatten()
        side = config.size >> len(config.widths)
        self.hidden = nn.Linear(config.widths[-1] * side * side, config.hidden)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(config.dropout)
        self.logits = nn.Linear(config.hidden, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        for convolution in self.convolutions:
            images = self.pooling(convolution(images))
        return self.logits(self.dropout(self.activation(self.hidden(self.flatten(images)))))


class CnnRecipe:
    """Image classification with cross entropy: batches of ``x`` (float images) and ``y`` (int64 class indices)."""

    Config = CnnConfig

    def __init__(self, **model: object) -> None:
        self.config = self.Config.model_validate(model)

    def parts(self) -> dict[str, nn.Module]:
        return {"cnn": Cnn(self.config)}

    def layout(self, part: str) -> Layout:
        stages = [f"convolutions.{i}" for i in range(len(self.config.widths))]
        return Layout(
            units=(*stages, "hidden", "logits"),
            tensor={"hidden": "column", "dropout": "dropout", "logits": "row"},
            pipeline=(
                *(name for stage in stages for name in (stage, "pooling")),
                *("flatten", "hidden", "activation", "dropout", "logits"),
            ),
        )

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return cross_entropy(parts[part](batch["x"]), batch["y"], smoothing=self.config.label_smoothing)

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        logits = parts["cnn"](batch["x"])
        return {
            "loss": cross_entropy(logits, batch["y"], smoothing=self.config.label_smoothing, per_sample=True),
            "accuracy": (logits.argmax(dim=1) == batch["y"]).to(torch.float32),
        }
