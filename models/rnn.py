"""Recurrent networks: plain RNN, LSTM and GRU, for sequence classification, next-token prediction and forecasting.

dltrain launch recipe=rnn model.cell=lstm     # scikit-learn's digits, read row by row
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..core.contracts import Batch, Layout
from ..core.spec import Spec
from .inputs import as_sequence, refuse_idle_keys
from .losses import RegressionLoss, cross_entropy, regression
from .text import token_metrics

_CELLS: Mapping[str, type[nn.RNN | nn.LSTM | nn.GRU]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
_KEYS = {
    "inputs": ("classify", "forecast"),
    "label_smoothing": ("classify", "next_token"),
    **dict.fromkeys(("classes", "bidirectional"), ("classify",)),
    **dict.fromkeys(("vocabulary", "tie_weights"), ("next_token",)),
    **dict.fromkeys(("horizon", "loss", "offset", "scale"), ("forecast",)),
}


class RnnConfig(Spec):
    """Arguments of the recurrent network (``model:`` in a job file)."""

    task: Literal["classify", "next_token", "forecast"] = "classify"
    """'classify': the class of a sequence of vectors, or of an image read row by row. 'next_token': at every place of
    a sequence of tokens, the one that follows. 'forecast': the values that follow on a window of a series."""
    cell: Literal["rnn", "lstm", "gru"] = "gru"
    """The recurrence: plain (tanh), long short-term memory, or gated recurrent unit."""
    hidden: int = Field(128, gt=0)
    """Width of the state."""
    layers: int = Field(1, gt=0)
    """Recurrent layers, one upon the other."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of every layer's outputs dropped in training."""
    inputs: int = Field(8, gt=0)
    """Features per step: of an image channels × width, of a plain series 1. Used by 'classify' and 'forecast'."""
    classes: int = Field(10, gt=1)
    """Number of classes; used by 'classify' alone."""
    bidirectional: bool = False
    """Read the sequence from both ends; used by 'classify' alone."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Probability that the targets spread evenly over all classes or tokens."""
    vocabulary: int = Field(256, gt=1)
    """Number of different tokens; used by 'next_token' alone."""
    tie_weights: bool = False
    """Use one matrix as the embedding and as the output layer; used by 'next_token' alone."""
    horizon: int = Field(8, gt=0)
    """Values to predict; used by 'forecast' alone."""
    loss: RegressionLoss = "mse"
    """Mean squared error, mean absolute error, or Huber's; used by 'forecast' alone."""
    offset: float = 0.0
    """What a network output of 0 means in the units of 'y', best the mean of 'y'; used by 'forecast' alone."""
    scale: float = Field(1.0, gt=0)
    """What a difference of 1 in the output means in the units of 'y', best their standard deviation; the loss is of
    errors in this unit. Used by 'forecast' alone."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        refuse_idle_keys(self, self.task, _KEYS)
        return self


class Rnn(nn.Module):
    """Sequences to logits or forecasts.

    'classify': floats ``[samples, steps, inputs]`` (or what :func:`as_sequence` makes into them) to ``[samples,
    classes]``, from the state after the last step, and for the backward direction after the first. 'forecast': the
    same to ``[samples, horizon]``. 'next_token': int64 ``[samples, steps]`` to ``[samples, steps, vocabulary]``.
    """

    def __init__(self, config: RnnConfig) -> None:
        super().__init__()
        tokens = config.task == "next_token"
        self.embedding = nn.Embedding(config.vocabulary, config.hidden) if tokens else None
        self.recurrence = _CELLS[config.cell](
            config.hidden if tokens else config.inputs,
            config.hidden,
            num_layers=config.layers,
            dropout=config.dropout if config.layers > 1 else 0.0,  # between layers; torch warns where there is one
            bidirectional=config.bidirectional,
            batch_first=True,
        )
        self.dropout = nn.Dropout(config.dropout)
        outputs = {"classify": config.classes, "next_token": config.vocabulary, "forecast": config.horizon}
        self.head = nn.Linear(config.hidden * (1 + config.bidirectional), outputs[config.task])
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=config.hidden**-0.5)  # fit for the output layer, if it is that
            if config.tie_weights:
                self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            return self.head(self.dropout(self.recurrence(self.embedding(x))[0]))
        _, state = self.recurrence(as_sequence(x))
        hidden = state[0] if isinstance(state, tuple) else state
        last = hidden[-2:].transpose(0, 1).flatten(1) if self.recurrence.bidirectional else hidden[-1]
        return self.head(self.dropout(last))


class RnnRecipe:
    """Batches of ``x`` (a sequence) and ``y``: a class index, the tokens that follow, or the values that follow."""

    Config = RnnConfig

    def __init__(self, **model: object) -> None:
        self.config = self.Config.model_validate(model)

    def parts(self) -> dict[str, nn.Module]:
        return {"rnn": Rnn(self.config)}

    def layout(self, part: str) -> Layout:
        """Tied weights belong to two modules, which then stay in one unit: that of the whole model."""
        if self.config.tie_weights:
            return Layout(units=("recurrence",))
        ends = ("embedding", "head") if self.config.task == "next_token" else ("head",)
        return Layout(units=("recurrence", *ends))

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return self._loss(parts[part](batch["x"]), batch["y"], per_sample=False)

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        """The loss, and: accuracy; bits per byte and accuracy over tokens; or errors in the units of 'y'."""
        outputs, y = parts["rnn"](batch["x"]), batch["y"]
        values = {"loss": self._loss(outputs, y, per_sample=True)}
        match self.config.task:
            case "classify":
                return {**values, "accuracy": (outputs.argmax(dim=1) == y).to(torch.float32)}
            case "next_token":
                return {**values, **token_metrics(outputs, batch)}
            case "forecast":
                error = self.config.offset + self.config.scale * outputs - y
                return {**values, "mae": error.abs().mean(dim=1), "mse": error.square().mean(dim=1)}

    def _loss(self, outputs: Tensor, y: Tensor, *, per_sample: bool) -> Tensor:
        if self.config.task != "forecast":
            return cross_entropy(outputs, y, smoothing=self.config.label_smoothing, per_sample=per_sample)
        wanted = (y - self.config.offset) / self.config.scale
        return regression(self.config.loss, outputs, wanted, per_sample=per_sample)
