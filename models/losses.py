"""Losses by name. Each gives the mean over a batch's samples, or, with ``per_sample``, one value per sample.

The two agree because every sample has the same number of elements (classes, tokens, predicted values), over which its
own loss is a mean: so each sample weighs the same.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

RegressionLoss = Literal["mse", "l1", "huber"]

_REGRESSION = {"mse": functional.mse_loss, "l1": functional.l1_loss, "huber": functional.huber_loss}


def cross_entropy(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0, per_sample: bool = False) -> Tensor:
    """Cross entropy in nats, averaged over a sample's positions where there are several.

    Args:
        logits: float ``[samples, ..., classes]``.
        targets: int64 class indices ``[samples, ...]``.
        smoothing: probability spread evenly over all classes (label smoothing: Szegedy et al. 2016, section 7).
        per_sample: shape ``[samples]`` instead of a scalar.
    """
    logits, flat = logits.flatten(0, -2), targets.flatten()
    if not per_sample:
        return functional.cross_entropy(logits, flat, label_smoothing=smoothing)
    each = functional.cross_entropy(logits, flat, label_smoothing=smoothing, reduction="none")
    return each.view(len(targets), -1).mean(dim=1)


def binary_cross_entropy(logits: Tensor, targets: Tensor, *, per_sample: bool = False) -> Tensor:
    """Binary cross entropy in nats of ``[samples]`` logits of class 1 against ``[samples]`` labels 0 and 1."""
    reduction = "none" if per_sample else "mean"
    return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction=reduction)


def regression(name: RegressionLoss, outputs: Tensor, targets: Tensor, *, per_sample: bool = False) -> Tensor:
    """Mean squared error, mean absolute error, or Huber's loss (1964) with its bend at an error of 1.

    ``outputs`` and ``targets`` have the same shape ``[samples, ...]``.
    """
    if not per_sample:
        return _REGRESSION[name](outputs, targets)
    return _REGRESSION[name](outputs, targets, reduction="none").view(len(targets), -1).mean(dim=1)
