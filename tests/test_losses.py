"""Losses: what they are, and that the mean is the mean of the samples' own."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from dltrain.models.losses import RegressionLoss, binary_cross_entropy, cross_entropy, regression

LOGITS = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.randint(0, 4, (6, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_over_a_sequence(smoothing: float) -> None:
    wanted = []
    for logits, targets in zip(LOGITS, TARGETS, strict=True):
        of_places = []
        for place, target in zip(logits, targets, strict=True):
            surprise = -(place - place.exp().sum().log())
            of_places.append((1 - smoothing) * surprise[target] + smoothing * surprise.mean())
        wanted.append(sum(of_places) / 5)
    got = cross_entropy(LOGITS, TARGETS, smoothing=smoothing, per_sample=True)
    torch.testing.assert_close(got, torch.stack(wanted))
    torch.testing.assert_close(cross_entropy(LOGITS, TARGETS, smoothing=smoothing), got.mean())


def test_cross_entropy_of_one_class_a_sample() -> None:
    got = cross_entropy(LOGITS[:, 0], TARGETS[:, 0], per_sample=True)
    torch.testing.assert_close(got, -LOGITS[:, 0].log_softmax(1)[range(6), TARGETS[:, 0]])
    torch.testing.assert_close(cross_entropy(LOGITS[:, 0], TARGETS[:, 0]), got.mean())


def test_binary_cross_entropy_takes_classes_and_floats() -> None:
    logits, y = LOGITS[:, 0, 0], torch.tensor([0, 1, 1, 0, 1, 0])
    right = torch.where(y == 1, logits.sigmoid(), 1 - logits.sigmoid())
    got = binary_cross_entropy(logits, y, per_sample=True)
    torch.testing.assert_close(got, -right.log())
    torch.testing.assert_close(binary_cross_entropy(logits, y.double()), got.mean())


@pytest.mark.parametrize("name", get_args(RegressionLoss))
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 2)])
def test_regression(name: RegressionLoss, shape: tuple[int, ...]) -> None:
    outputs, y = 3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    error = (outputs - y).abs()
    each = {"mse": error**2, "l1": error, "huber": torch.where(error < 1, error**2 / 2, error - 0.5)}[name]
    got = regression(name, outputs, y, per_sample=True)
    torch.testing.assert_close(got, torch.stack([sample.mean() for sample in each]))
    torch.testing.assert_close(regression(name, outputs, y), got.mean())
