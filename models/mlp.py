"""A multilayer perceptron for tables: classification, yes or no, regression.

dltrain launch recipe=mlp model.task=classify model.inputs=13 model.classes=3 data.source=wine
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..core.contracts import Batch, Layout
from ..core.spec import Spec
from .inputs import refuse_idle_keys
from .losses import RegressionLoss, binary_cross_entropy, cross_entropy, regression

_KEYS = {
    "classes": ("classify",),
    "label_smoothing": ("classify",),
    **dict.fromkeys(("loss", "offset", "scale"), ("regress",)),
}


class MlpConfig(Spec):
    """Arguments of the multilayer perceptron (``model:`` in a job file)."""

    task: Literal["classify", "binary", "regress"] = "classify"
    """'classify': 'y' is a class index, cross entropy. 'binary': 'y' is 0 or 1, binary cross entropy. 'regress': 'y' is
    a real number."""
    inputs: int = Field(4, gt=0)
    """Features of a sample."""
    hidden: list[int] = Field(default_factory=lambda: [64, 64])
    """Widths of the hidden layers; none makes it a linear model."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the hidden layers' outputs dropped in training."""
    classes: int = Field(3, gt=1)
    """Number of classes; used by 'classify' alone."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Probability that the targets spread evenly over all classes; used by 'classify' alone."""
    loss: RegressionLoss = "mse"
    """Mean squared error, mean absolute error, or Huber's; used by 'regress' alone."""
    offset: float = 0.0
    """What a network output of 0 means in the units of 'y', best the mean of 'y'; used by 'regress' alone."""
    scale: float = Field(1.0, gt=0)
    """What a difference of 1 in the output means in the units of 'y', best their standard deviation; the loss is of
    errors in this unit. Used by 'regress' alone."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(width < 1 for width in self.hidden):
            raise ValueError("hidden must be positive")
        refuse_idle_keys(self, self.task, _KEYS)
        return self


class Mlp(nn.Module):
    """``[samples, inputs]`` floats to ``[samples, outputs]``, with ReLU between the layers."""

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        widths = [config.inputs, *config.hidden]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.between = nn.Sequential(nn.ReLU(), nn.Dropout(config.dropout))
        self.head = nn.Linear(widths[-1], config.classes if config.task == "classify" else 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.between(layer(x))
        return self.head(x)


class MlpRecipe:
    """A table: batches of ``x`` (floats, ``[samples, inputs]``) and ``y`` (class indices, 0 and 1, or floats)."""

    Config = MlpConfig

    def __init__(self, **model: object) -> None:
        self.config = self.Config.model_validate(model)

    def parts(self) -> dict[str, nn.Module]:
        return {"mlp": Mlp(self.config)}

    def layout(self, part: str) -> Layout:
        layers = [f"layers.{i}" for i in range(len(self.config.hidden))]
        return Layout(
            units=(*layers, "head"),
            pipeline=(*(name for layer in layers for name in (layer, "between")), "head"),
        )

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return self._loss(parts[part](batch["x"]), batch["y"], per_sample=False)

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        """The loss; the accuracy, or for 'regress' the absolute and the squared error in the units of 'y'."""
        outputs, y = parts["mlp"](batch["x"]), batch["y"]
        values = {"loss": self._loss(outputs, y, per_sample=True)}
        if self.config.task == "regress":
            error = self.config.offset + self.config.scale * outputs.squeeze(1) - y
            return {**values, "mae": error.abs(), "mse": error.square()}
        found = outputs.argmax(dim=1) if self.config.task == "classify" else (outputs.squeeze(1) > 0)
        return {**values, "accuracy": (found == y).to(torch.float32)}

    def _loss(self, outputs: Tensor, y: Tensor, *, per_sample: bool) -> Tensor:
        config = self.config
        match config.task:
            case "classify":
                return cross_entropy(outputs, y, smoothing=config.label_smoothing, per_sample=per_sample)
            case "binary":
                return binary_cross_entropy(outputs.squeeze(1), y, per_sample=per_sample)
            case "regress":
                wanted = (y - config.offset) / config.scale
                return regression(config.loss, outputs.squeeze(1), wanted, per_sample=per_sample)
