"""The perceptron against what its documentation says."""

from __future__ import annotations

import pytest
import torch
from dltrain.core.contracts import Batch
from dltrain.models.mlp import MlpRecipe
from pydantic import ValidationError
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear, relu

X = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


def outputs(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    x = relu(linear(X, weights["layers.0.weight"], weights["layers.0.bias"]))
    x = relu(linear(x, weights["layers.1.weight"], weights["layers.1.bias"]))
    return linear(x, weights["head.weight"], weights["head.bias"])


@pytest.mark.parametrize("task", ["classify", "binary", "regress"])
def test_loss_and_metrics(task: str) -> None:
    options = {"offset": 10.0, "scale": 4.0, "loss": "huber"} if task == "regress" else {}
    recipe = MlpRecipe(task=task, inputs=7, hidden=[6, 5], dropout=0.0, **options)
    parts = recipe.parts()
    found = outputs(parts["mlp"].state_dict())
    y = torch.tensor([1, 0, 1, 1, 0]) if task != "regress" else torch.tensor([7.0, 30.0, 10.0, -5.0, 11.0])
    batch = Batch({"x": X, "y": y}, 0, 0, 1.0)
    metrics = recipe.metrics(parts, batch)
    if task == "classify":
        loss = cross_entropy(found, y)
        assert metrics["accuracy"].tolist() == [
            float(row.argmax() == label) for row, label in zip(found, y, strict=True)
        ]
    elif task == "binary":
        loss = binary_cross_entropy_with_logits(found[:, 0], y.float())
        assert metrics["accuracy"].tolist() == [
            float((row > 0) == label) for row, label in zip(found[:, 0], y, strict=True)
        ]
    else:
        error = (found[:, 0] - (y - 10) / 4).abs()
        loss = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
        torch.testing.assert_close(metrics["mae"], 4 * error)
        torch.testing.assert_close(metrics["mse"], 16 * error**2)
    torch.testing.assert_close(recipe.loss("mlp", parts, batch), loss)
    torch.testing.assert_close(metrics["loss"].mean(), loss)
    assert all(parts["mlp"].get_submodule(unit) for unit in recipe.layout("mlp").units)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden": [3, 0]}, "hidden must be positive"),
        ({"task": "regress", "classes": 3}, "'classes' is of no use to the task 'regress', only to classify"),
        ({"task": "binary", "scale": 2.0}, "'scale' is of no use to the task 'binary'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        MlpRecipe(**options)
