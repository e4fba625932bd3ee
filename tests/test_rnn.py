"""Recurrent networks against their equations written out, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from dltrain.core.contracts import Batch
from dltrain.models.rnn import RnnRecipe
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

Weights = dict[str, Tensor]


def cell(kind: str, w: Weights, suffix: str, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One step: (h, c) from (h, c), with c unused by all but the LSTM. The equations are those of torch's pages."""
    h, c = state
    of_x = linear(x, w[f"weight_ih_{suffix}"], w[f"bias_ih_{suffix}"])
    of_h = linear(h, w[f"weight_hh_{suffix}"], w[f"bias_hh_{suffix}"])
    if kind == "rnn":
        return (of_x + of_h).tanh(), c
    if kind == "lstm":
        i, f, g, o = (of_x + of_h).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    (r_x, z_x, n_x), (r_h, z_h, n_h) = of_x.chunk(3, dim=1), of_h.chunk(3, dim=1)
    z = (z_x + z_h).sigmoid()
    return (1 - z) * (n_x + (r_x + r_h).sigmoid() * n_h).tanh() + z * h, c


def run(kind: str, w: Weights, suffix: str, x: Tensor, hidden: int) -> list[Tensor]:
    """The states after each step of a layer; for a suffix '…_reverse' from the end on."""
    state = (torch.zeros(len(x), hidden), torch.zeros(len(x), hidden))
    states = []
    steps = x.unbind(1)
    for step in reversed(steps) if suffix.endswith("reverse") else steps:
        state = cell(kind, w, suffix, step, state)
        states.append(state[0])
    return states


def weights(parts: dict[str, torch.nn.Module]) -> tuple[Weights, Weights]:
    """All weights, and those of the recurrence by their own names."""
    every = dict(parts["rnn"].state_dict())
    return every, {n.removeprefix("recurrence."): w for n, w in every.items() if n.startswith("recurrence.")}


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_classify_reads_an_images_rows_from_both_ends(kind: str) -> None:
    recipe = RnnRecipe(cell=kind, inputs=10, hidden=6, layers=2, bidirectional=True, dropout=0.0, label_smoothing=0.1)
    parts = recipe.parts()
    every, w = weights(parts)
    images = torch.randn(3, 2, 7, 5)  # 7 rows of 2 channels × 5 pixels
    x = torch.stack([torch.cat([images[:, 0, row], images[:, 1, row]], dim=1) for row in range(7)], dim=1)
    ahead, back = run(kind, w, "l0", x, 6), run(kind, w, "l0_reverse", x, 6)
    middle = torch.stack([torch.cat(pair, dim=1) for pair in zip(ahead, reversed(back), strict=True)], dim=1)
    last = torch.cat([run(kind, w, "l1", middle, 6)[-1], run(kind, w, "l1_reverse", middle, 6)[-1]], dim=1)
    logits = linear(last, every["head.weight"], every["head.bias"])
    torch.testing.assert_close(parts["rnn"](images), logits)
    batch = Batch({"x": images, "y": torch.tensor([3, 0, 9])}, 0, 0, 1.0)
    wanted = cross_entropy(logits, batch["y"], label_smoothing=0.1)
    torch.testing.assert_close(recipe.loss("rnn", parts, batch), wanted)
    metrics = recipe.metrics(parts, batch)
    torch.testing.assert_close(metrics["loss"].mean(), wanted)
    assert metrics["accuracy"].tolist() == (logits.argmax(1) == batch["y"]).float().tolist()


@pytest.mark.parametrize("tied", [False, True])
def test_next_token(tied: bool) -> None:
    recipe = RnnRecipe(task="next_token", cell="gru", vocabulary=11, hidden=6, dropout=0.0, tie_weights=tied)
    parts = recipe.parts()
    every, w = weights(parts)
    tokens = torch.randint(0, 11, (4, 9))
    x, y = tokens[:, :-1], tokens[:, 1:]
    assert torch.equal(every["embedding.weight"], every["head.weight"]) == tied
    states = torch.stack(run("gru", w, "l0", every["embedding.weight"][x], 6), dim=1)
    logits = linear(states, every["head.weight"], every["head.bias"])
    torch.testing.assert_close(parts["rnn"](x), logits)
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    assert torch.equal(parts["rnn"](changed)[:, :5], parts["rnn"](x)[:, :5])
    metrics = recipe.metrics(parts, Batch({"x": x, "y": y}, 0, 0, 1.0))
    nats = -logits.log_softmax(2).gather(2, y[..., None])[..., 0]
    torch.testing.assert_close(metrics["loss"], nats.mean(1))
    torch.testing.assert_close(metrics["bpb"], nats.sum(1) / (8 * math.log(2)))
    of_bytes = recipe.metrics(parts, Batch({"x": x, "y": y, "bytes": torch.tensor([20, 16, 30, 9])}, 0, 0, 1.0))
    torch.testing.assert_close(of_bytes["bits"], nats.sum(1) / math.log(2))
    torch.testing.assert_close(of_bytes["bpb"] * of_bytes["bytes"], of_bytes["bits"])


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_forecast_is_in_the_units_of_the_series(loss: str) -> None:
    recipe = RnnRecipe(task="forecast", cell="lstm", inputs=1, hidden=5, horizon=3, offset=50.0, scale=10.0, loss=loss)
    parts = recipe.parts()
    parts["rnn"].eval()
    every, w = weights(parts)
    x, y = torch.randn(4, 6, 1), 50 + 20 * torch.randn(4, 3)
    outputs = linear(run("lstm", w, "l0", x, 5)[-1], every["head.weight"], every["head.bias"])
    error = (50 + 10 * outputs - y).abs()
    e = error / 10
    each = {"mse": e**2, "l1": e, "huber": torch.where(e < 1, e**2 / 2, e - 0.5)}[loss]
    for window in (x, x[:, :, 0]):
        batch = Batch({"x": window, "y": y}, 0, 0, 1.0)
        torch.testing.assert_close(recipe.loss("rnn", parts, batch), each.mean())
        metrics = recipe.metrics(parts, batch)
        torch.testing.assert_close(metrics["loss"], each.mean(1))
        torch.testing.assert_close(metrics["mae"], error.mean(1))
        torch.testing.assert_close(metrics["mse"], error.square().mean(1))


def test_every_unit_of_the_layout_is_a_module_and_tied_weights_are_in_none() -> None:
    for options in ({}, {"task": "next_token"}, {"task": "next_token", "tie_weights": True}, {"task": "forecast"}):
        recipe = RnnRecipe(**options)
        model = recipe.parts()["rnn"]
        in_units = {p for unit in recipe.layout("rnn").units for p in model.get_submodule(unit).parameters()}
        shared = {p for p in model.parameters() if p.shape == (256, 128)} if "tie_weights" in options else set()
        assert len(shared) == (1 if "tie_weights" in options else 0)
        assert in_units == set(model.parameters()) - shared - ({model.head.bias} if shared else set())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "forecast", "bidirectional": True}, "'bidirectional' is of no use to the task 'forecast'"),
        ({"task": "classify", "horizon": 3}, "'horizon' is of no use to the task 'classify', only to forecast"),
        ({"task": "next_token", "inputs": 3}, "only to classify and forecast"),
        ({"cell": "qrnn"}, "cell"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RnnRecipe(**options)
