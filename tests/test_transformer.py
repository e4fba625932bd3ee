"""The Transformer against one written out here: softmax by hand, rotary positions as complex numbers."""

from __future__ import annotations

import math

import pytest
import torch
from dltrain.core.contracts import Batch
from dltrain.models.attention import Attention, rotate
from dltrain.models.transformer import PRESETS, Transformer, TransformerConfig, TransformerRecipe
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, silu

SMALL = {"dim": 24, "layers": 2, "heads": 6, "kv_heads": 2, "feedforward": 40, "vocabulary": 13}
Weights = dict[str, Tensor]


def turned(x: Tensor, base: float = 10000.0) -> Tensor:
    """``x`` [samples, steps, width]: its halves as complex numbers, times e^(i · step · base^(-2k/width))."""
    half = x.shape[2] // 2
    speeds = torch.tensor([base ** (-k / half) for k in range(half)])
    angle = torch.arange(x.shape[1])[:, None] * speeds
    product = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([product.real, product.imag], dim=2)


def attention(w: Weights, name: str, x: Tensor, *, causal: bool) -> Tensor:
    """Head by head; query head h uses the keys and values of head h // 3."""
    q, k, v = (linear(x, w[f"{name}.{which}.weight"]) for which in "qkv")
    heads = []
    for h in range(6):
        own, shared = slice(4 * h, 4 * h + 4), slice(4 * (h // 3), 4 * (h // 3) + 4)
        scores = turned(q[..., own]) @ turned(k[..., shared]).transpose(1, 2) / math.sqrt(4)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        heads.append(scores.exp() / scores.exp().sum(2, keepdim=True) @ v[..., shared])
    return linear(torch.cat(heads, dim=2), w[f"{name}.output.weight"])


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(2, keepdim=True) + 1e-5).sqrt() * weight


def blocks(w: Weights, x: Tensor, *, causal: bool) -> Tensor:
    for i in range(2):
        inner = normed(x, w[f"blocks.{i}.attention_norm.weight"])
        x = x + attention(w, f"blocks.{i}.attention", inner, causal=causal)
        inner = normed(x, w[f"blocks.{i}.feedforward_norm.weight"])
        gate, up, down = (w[f"blocks.{i}.feedforward.{which}.weight"] for which in ("gate", "up", "down"))
        x = x + linear(silu(linear(inner, gate)) * linear(inner, up), down)
    return normed(x, w["norm.weight"])


def shaken(recipe: TransformerRecipe) -> dict[str, nn.Module]:
    """The parts with weights far from their small first values, so that every term counts."""
    parts = recipe.parts()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parts["transformer"].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return parts


@pytest.mark.parametrize("tied", [True, False])
def test_language_model(tied: bool) -> None:
    recipe = TransformerRecipe(**SMALL, tie_weights=tied, label_smoothing=0.1)
    parts = shaken(recipe)
    w = parts["transformer"].state_dict()
    tokens = torch.randint(0, 13, (3, 8))
    x, y = tokens[:, :-1], tokens[:, 1:]
    assert torch.equal(w["embedding.weight"], w["head.weight"]) == tied
    logits = linear(blocks(w, w["embedding.weight"][x], causal=True), w["head.weight"])
    torch.testing.assert_close(parts["transformer"](x), logits, rtol=1e-4, atol=1e-4)
    batch = Batch({"x": x, "y": y}, 0, 0, 1.0)
    wanted = cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(recipe.loss("transformer", parts, batch), wanted, rtol=1e-4, atol=1e-5)
    metrics = recipe.metrics(parts, batch)
    torch.testing.assert_close(metrics["loss"].mean(), wanted, rtol=1e-4, atol=1e-5)
    nats = -logits.log_softmax(2).gather(2, y[..., None])[..., 0]
    torch.testing.assert_close(metrics["bpb"], nats.mean(1) / math.log(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["accuracy"], (logits.argmax(2) == y).float().mean(1))


@pytest.mark.parametrize("inputs", [None, 10])
def test_encoder(inputs: int | None) -> None:
    options = dict(SMALL) if inputs is None else {**SMALL, "inputs": inputs}
    if inputs is not None:
        del options["vocabulary"]
    recipe = TransformerRecipe(task="classify", classes=4, **options)
    parts = shaken(recipe)
    w = parts["transformer"].state_dict()
    if inputs is None:
        x = torch.randint(0, 13, (3, 7))
        first = w["embedding.weight"][x]
    else:
        x = torch.randn(3, 2, 7, 5)
        rows = x.transpose(1, 2).reshape(3, 7, 10)
        first = linear(rows, w["embedding.weight"], w["embedding.bias"])
    logits = linear(blocks(w, first, causal=False).mean(1), w["head.weight"], w["head.bias"])
    torch.testing.assert_close(parts["transformer"](x), logits, rtol=1e-4, atol=1e-4)
    metrics = recipe.metrics(parts, Batch({"x": x, "y": torch.tensor([0, 3, 1])}, 0, 0, 1.0))
    assert metrics.keys() == {"loss", "accuracy"}
    assert metrics["accuracy"].tolist() == (logits.argmax(1) == torch.tensor([0, 3, 1])).float().tolist()


def test_a_later_token_changes_nothing_before_it() -> None:
    model = shaken(TransformerRecipe(**SMALL))["transformer"].eval()
    tokens = torch.randint(0, 13, (2, 9))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 13
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    assert ((before - after)[:, 6:].abs().amax(2) > 1e-4).all()


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8)
    turned_q, turned_k = (rotate(x.expand(1, 1, 12, 8), base=100.0)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(-5, 6):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-5)
    assert scores[0].std() > 1e-2


def test_a_share_of_the_heads_computes_its_share_of_the_output() -> None:
    """What tensor parallelism does: rows of q, k and v, and columns of the output layer."""
    whole = Attention(24, heads=6, kv_heads=2, causal=True, rope_base=10000.0)
    x = torch.randn(2, 5, 24)
    total = torch.zeros(2, 5, 24)
    for share in range(2):
        part = Attention(24, heads=6, kv_heads=2, causal=True, rope_base=10000.0)
        for name in "qkv":
            weight = getattr(whole, name).weight
            getattr(part, name).weight = nn.Parameter(weight.chunk(2)[share])
        part.output.weight = nn.Parameter(whole.output.weight.chunk(2, dim=1)[share])
        total += part(x)
    torch.testing.assert_close(total, whole(x))


def test_dropout_acts_in_training_alone() -> None:
    model = shaken(TransformerRecipe(**SMALL, dropout=0.5))["transformer"]
    tokens = torch.randint(0, 13, (2, 9))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


# Llama 2 7B and Llama 3.2 1B have these numbers of parameters.
@pytest.mark.parametrize(
    ("preset", "parameters"), [("70b", 70_553_706_496), ("7b", 6_738_415_616), ("1b", 1_235_814_400)]
)
def test_large_presets_can_be_built_without_memory(preset: str, parameters: int) -> None:
    recipe = TransformerRecipe(preset=preset)
    with torch.device("meta"):
        model = recipe.parts()["transformer"]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_from_the_meta_device_is_the_same_model(tied: bool) -> None:
    config = TransformerConfig.model_validate({**SMALL, "tie_weights": tied})
    with torch.device("meta"):
        later = Transformer(config)
    later.to_empty(device="cpu")
    direct = Transformer(config)
    for model in (later, direct):
        torch.manual_seed(5)
        model.reset_parameters()
    tokens = torch.randint(0, 13, (2, 9))
    assert torch.equal(later(tokens), direct(tokens))
    assert later.state_dict().keys() == direct.state_dict().keys()
    assert (later.head.weight is later.embedding.weight) == tied


def test_first_weights_have_the_stated_deviations() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.model_validate({"preset": "mini", "tie_weights": False}))
    for name, parameter in model.state_dict().items():
        residual = name.endswith(("attention.output.weight", "feedforward.down.weight"))
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        else:
            assert float(parameter.std()) == pytest.approx(0.02 / math.sqrt(8) if residual else 0.02, rel=0.02)
            assert abs(float(parameter.mean())) < 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_give_way_to_what_is_given(preset: str) -> None:
    plain = TransformerRecipe(preset=preset).config
    assert {key: getattr(plain, key) for key in PRESETS[preset]} == PRESETS[preset]
    given = TransformerRecipe(preset=preset, layers=3, vocabulary=77).config
    assert given == plain.model_copy(update={"layers": 3, "vocabulary": 77})
    assert TransformerRecipe(preset=preset, task="classify", inputs=8).config.dim == plain.dim


def test_the_smallest_preset_is_the_default() -> None:
    assert TransformerConfig() == TransformerConfig(preset="tiny")


def test_every_unit_of_the_layout_is_a_module_and_tied_weights_are_in_none() -> None:
    for options in ({}, {"tie_weights": False}, {"task": "classify"}):
        recipe = TransformerRecipe(**options)
        model = recipe.parts()["transformer"]
        in_units = {p for unit in recipe.layout("transformer").units for p in model.get_submodule(unit).parameters()}
        at_root = {model.norm.weight} | (set() if options else {model.embedding.weight})
        assert in_units == set(model.parameters()) - at_root


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": 5}, "dim 64 does not give each of 5 heads an even width"),
        ({"dim": 60, "heads": 20, "kv_heads": 1}, "does not give each of 20 heads an even width"),
        ({"kv_heads": 3}, "4 heads cannot be shared evenly by 3 kv_heads"),
        ({"inputs": 8}, "'inputs' is of no use to the task 'next_token', only to classify"),
        ({"task": "classify", "tie_weights": True}, "'tie_weights' is of no use to the task 'classify'"),
        ({"task": "classify", "inputs": 8, "vocabulary": 9}, "give one of them"),
        ({"preset": "8b"}, "preset"),
        ({"preset": ["tiny"]}, "preset"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TransformerRecipe(**options)
