"""The CNN's options against networks written out here."""

from __future__ import annotations

import pytest
import torch
from dltrain.core.contracts import Batch
from dltrain.models.cnn import Cnn, CnnConfig, CnnRecipe
from pydantic import ValidationError
from torch.nn.functional import batch_norm, conv2d, cross_entropy, group_norm, linear, max_pool2d, relu

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SHAPE = {"channels": 3, "widths": [6, 6, 12], "dropout": 0.0}


def test_residual_blocks_with_group_norm() -> None:
    torch.manual_seed(0)
    model = Cnn(CnnConfig.model_validate({**SHAPE, "residual": True, "norm": "group", "groups": 3}))
    w = model.state_dict()

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        x = conv2d(x, w[f"{name}.0.weight"], padding=1)
        return group_norm(x, 3, w[f"{name}.1.weight"], w[f"{name}.1.bias"])

    x = IMAGES
    for i in range(3):
        stage = f"convolutions.{i}"
        kept = x if i == 1 else conv2d(x, w[f"{stage}.shortcut.weight"], w[f"{stage}.shortcut.bias"])
        x = kept + normed(relu(normed(x, f"{stage}.first")), f"{stage}.second")
        x = max_pool2d(relu(x), 2)
    x = relu(linear(x.flatten(1), w["hidden.weight"], w["hidden.bias"]))
    torch.testing.assert_close(model(IMAGES), linear(x, w["logits.weight"], w["logits.bias"]))


@pytest.mark.parametrize("kind", ["microbatch", "synchronised"])
def test_batch_norm_in_one_process(kind: str) -> None:
    model = Cnn(CnnConfig.model_validate({**SHAPE, "widths": [6], "norm": "batch", "batch_norm": kind}))
    w = {name: value.clone() for name, value in model.state_dict().items()}
    first = conv2d(IMAGES, w["convolutions.0.0.weight"], padding=1)
    mean, variance = first.mean((0, 2, 3)), first.var((0, 2, 3), correction=0)
    x = relu((first - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt())
    x = relu(linear(max_pool2d(x, 2).flatten(1), w["hidden.weight"], w["hidden.bias"]))
    torch.testing.assert_close(model(IMAGES), linear(x, w["logits.weight"], w["logits.bias"]), rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    torch.testing.assert_close(after["convolutions.0.1.running_mean"], 0.1 * mean)
    torch.testing.assert_close(after["convolutions.0.1.running_var"], 0.9 + 0.1 * first.var((0, 2, 3)))
    x = batch_norm(first, after["convolutions.0.1.running_mean"], after["convolutions.0.1.running_var"])
    x = relu(linear(max_pool2d(relu(x), 2).flatten(1), w["hidden.weight"], w["hidden.bias"]))
    wanted = linear(x, w["logits.weight"], w["logits.bias"])
    torch.testing.assert_close(model.eval()(IMAGES), wanted, rtol=1e-4, atol=1e-5)


def test_every_unit_of_the_layout_is_a_module() -> None:
    for options in ({}, {"residual": True, "norm": "batch"}):
        recipe = CnnRecipe(**options)
        model = recipe.parts()["cnn"]
        assert all(model.get_submodule(unit) for unit in recipe.layout("cnn").units)


def test_smoothing_is_in_the_loss_and_in_its_metric() -> None:
    recipe = CnnRecipe(**SHAPE, label_smoothing=0.3)
    parts = recipe.parts()
    y = torch.tensor([1, 2, 9, 0])
    batch = Batch({"x": IMAGES, "y": y}, 0, 0, 1.0)
    wanted = cross_entropy(parts["cnn"](IMAGES), y, label_smoothing=0.3)
    torch.testing.assert_close(recipe.loss("cnn", parts, batch), wanted)
    metrics = recipe.metrics(parts, batch)
    torch.testing.assert_close(metrics["loss"].mean(), wanted)
    assert metrics["accuracy"].tolist() == (parts["cnn"](IMAGES).argmax(1) == y).float().tolist()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"widths": [8, 16, 32, 64]}, "4 poolings leave nothing of 8 × 8 pixels"),
        ({"norm": "group", "groups": 3}, "widths must be multiples of the 3 groups"),
        ({"groups": 2}, "'groups' is of use to norm 'group' only, not to 'none'"),
        ({"norm": "group", "batch_norm": "synchronised"}, "'batch_norm' is of use to norm 'batch' only"),
        ({"norm": "layer"}, "norm"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        CnnRecipe(**options)
