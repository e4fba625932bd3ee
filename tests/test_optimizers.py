"""Optimizers and schedules by name, against torch's own used by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dltrain.core.job import Job
from dltrain.core.train import Optimizer, Schedule
from dltrain.models.gan import GanRecipe
from dltrain.strategies.build import check_parts
from dltrain.strategies.optimizers import build_optimizers
from dltrain.strategies.schedule import rate
from jobfiles import problem
from torch import nn


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def trained(optimizers: list[torch.optim.Optimizer], model: nn.Module, steps: int = 8) -> list[torch.Tensor]:
    """The model's parameters after some steps on fixed data."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        words = torch.randint(7, (4,), generator=generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(words).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() for p in model.parameters()]


def by_hand(spec: Optimizer, model: nn.Module) -> list[torch.optim.Optimizer]:
    embedding, first, gain, bias, last = (
        *(model[0].weight, model[1].weight),
        *(model[2].weight, [model[1].bias, model[2].bias, model[3].bias], model[3].weight),
    )
    matrices, rest = [embedding, first, last], [gain, *bias]
    decaying = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    betas = (spec.betas[0], spec.betas[1])
    match spec.name:
        case "sgd":
            return [torch.optim.SGD(decaying, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov)]
        case "adam":
            return [torch.optim.Adam(decaying, lr=spec.lr, betas=betas, eps=spec.eps)]
        case "adamw":
            return [torch.optim.AdamW(decaying, lr=spec.lr, betas=betas)]
        case "adafactor":
            return [torch.optim.Adafactor(decaying, lr=spec.lr)]
        case "muon":
            hidden = torch.optim.Muon(
                [first, last],
                lr=spec.lr,
                weight_decay=spec.weight_decay,
                momentum=spec.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            others = [{"params": [embedding], "weight_decay": spec.weight_decay}, {"params": rest, "weight_decay": 0.0}]
            return [hidden, torch.optim.AdamW(others, lr=spec.lr, betas=betas)]


@pytest.mark.parametrize(
    "spec",
    [
        Optimizer(name="sgd", weight_decay=0.1, nesterov=True),
        Optimizer(name="adam", weight_decay=0.1, betas=[0.5, 0.9], eps=1e-3),
        Optimizer(name="adamw", weight_decay=0.1),
        Optimizer(name="adafactor", weight_decay=0.1, lr=0.01),
        Optimizer(name="muon", weight_decay=0.1),
    ],
    ids=lambda spec: spec.name,
)
def test_each_name_is_torchs_optimizer_and_norms_and_biases_do_not_decay(spec: Optimizer) -> None:
    ours, theirs = net(), net()
    mine = trained(build_optimizers(ours, spec), ours)
    assert not torch.equal(mine[1], net()[1].weight)
    torch.testing.assert_close(mine, trained(by_hand(spec, theirs), theirs), rtol=0, atol=0)


def test_a_frozen_parameter_is_in_no_optimizer() -> None:
    model = net()
    model[0].requires_grad_(False)
    held = {id(p) for o in build_optimizers(model, Optimizer(name="muon")) for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()} - {id(model[0].weight)}


TORCHS: dict[str, tuple[Schedule, Any]] = {
    "constant": (Schedule(name="constant"), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
    "cosine": (Schedule(name="cosine"), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40)),
    "cosine to a floor": (
        Schedule(name="cosine", floor=0.1),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.05),
    ),
    "step": (Schedule(name="step", every=7, factor=0.3), lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.3)),
    "one_cycle": (Schedule(name="one_cycle"), lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, 40)),
}


@pytest.mark.parametrize("name", TORCHS)
def test_schedules_are_torchs(name: str) -> None:
    schedule, make = TORCHS[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = make(optimizer)
    for step in range(40):
        share = rate(schedule, step=step, total_steps=40)
        assert 0.5 * share == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12), step
        optimizer.step()
        scheduler.step()


def test_warm_up_is_linear_and_the_rest_begins_after_it() -> None:
    schedule = Schedule(name="step", warmup_steps=3, every=2, factor=0.5)
    assert [rate(schedule, step=step, total_steps=9) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 0.5, 0.5, 0.25]


def test_one_cycle_with_a_rise_as_long_as_the_run_ends_at_the_peak() -> None:
    schedule = Schedule(name="one_cycle", warmup_steps=10)
    shares = [rate(schedule, step=step, total_steps=10) for step in range(10)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (1 / 25, 1.0)


def test_a_plateau_falls_as_often_as_it_is_told() -> None:
    schedule = Schedule(name="plateau", factor=0.5)
    assert [rate(schedule, step=5, total_steps=10, falls=falls) for falls in range(3)] == [1, 0.5, 0.25]


@pytest.mark.usefixtures("empty_folder")
def test_a_parts_optimizer_is_the_common_one_with_its_own_values() -> None:
    text = "train: {optimizer: {name: sgd, lr: 0.1}, parts: {generator: {lr: 0.2, every: 5}}}"
    train = Job.model_validate({"train": {"parts": {"generator": {"lr": 0.2}}}}).train
    assert train.optimizer_of("generator").lr == 0.2
    assert train.optimizer_of("discriminator") == train.optimizer
    assert "part 'generator': unknown key 'lrr'" in problem(text.replace("{lr: 0.2", "{lrr: 0.2")).what
    assert "expected a number, found the text 'x'" in problem(text.replace("{lr: 0.2", "{lr: x")).what


def test_a_part_that_the_recipe_does_not_have_is_refused() -> None:
    job = Job.model_validate({"train": {"parts": {"generater": {"lr": 0.2}}}})
    with pytest.raises(Exception, match=r"train\.parts: cnn has no part 'generater' \(did you mean 'generator'\?\)"):
        check_parts(job, GanRecipe(), {"discriminator": net(), "generator": net()})
