"""A job's step, as one rank of many would make it, on tensors without memory: what it holds, sends and computes.

    python -m dltrain.training.dryrun

answers requests, one JSON object a line, until its input ends. What runs is the engine that trains, on torch's fake
tensors and a process group whose collectives do nothing. Numbers are missing; shapes, lifetimes and messages are all
there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..core.contracts import Recipe
from ..core.errors import JobError, Problem
from ..core.job import Job
from ..data.sources import open_source
from ..data.split import split_source
from ..strategies.ledger import KINDS, Rates
from ..strategies.shallow import Shallow, Stack, cut_to, find_stack
from .follow import follow
from .recipes import build_parts, load_recipe
from .standin import Course, Device, Sample, Setting, StandIn, along, fewer, same

_DEPTHS = (3, 4, 2)  # of models that are followed in the place of a deep one; the last to check the others
_MANY = 16  # ranks that share a model out; more are followed as few
_FEW = (16, 32)  # under ZeRO
_APART = 0.01  # how far the shallowest may lie from the line through the others


@dataclass
class Footprint:
    """What the rank takes.

    Attributes:
        peaks: by phase ("build", "forward", "backward", "optimizer", "evaluate") the bytes by kind at its peak.
        held: bytes by kind between two steps.
        seconds: least time of a step's operations.
        flops: floating-point operations of a step.
        sent: by (kind of collective, ranks, nodes spanned) the bytes that this rank sends in a step, and in how many
            messages.
        parameters: of the whole model.
    """

    peaks: dict[str, dict[str, float]]
    held: dict[str, float]
    seconds: float
    flops: float
    sent: list[tuple[tuple[str, int, int], float, float]]
    parameters: int


@dataclass(frozen=True)
class Model:
    """A job's recipe, and its parts without memory.

    Attributes:
        parameters: of the whole model.
        stack: the like blocks of which few may stand for many, if there are enough.
    """

    recipe: Recipe
    modules: Mapping[str, nn.Module]
    parameters: int
    stack: Stack | None


class Models:
    """Builds models; the newest is kept, since requests mostly ask about one and the same."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._newest: Model | None = None

    def of(self, job: Job) -> Model:
        """The job's model.

        Raises:
            JobError: as :func:`load_recipe`.
        """
        key = job.recipe, json.dumps(job.model)
        if self._newest is None or self._key != key:
            recipe = load_recipe(job)
            modules = build_parts(recipe)
            parameters = sum(weight.numel() for module in modules.values() for weight in module.parameters())
            self._key, self._newest = key, Model(recipe, modules, parameters, find_stack(recipe, modules))
        return self._newest


def footprint(job: Job, setting: Setting, model: Model) -> Footprint:
    """What ``setting.rank`` takes for a step of ``job``.

    A model with many like blocks is followed with few of them, and many ranks that share one out are followed as few:
    what a rank takes grows by the same amount with each block, and falls as the ranks grow in number.

    Raises:
        JobError: the job does not fit the recipe, or what it computes depends on values.
    """
    parallel = job.parallel
    data = parallel.axes(setting.world)["data"]
    shards = data // parallel.replicas
    if parallel.zero_stage and parallel.deepspeed is None and data > _FEW[1]:
        few, more = (_deep(model, fewer(job, setting, ranks), checked=False) for ranks in _FEW)
        distance = (1 / data - 1 / _FEW[1]) / (1 / _FEW[1] - 1 / _FEW[0])
        course = along(few, more, distance) or _deep(model, same(job, setting))
    elif parallel.strategy == "fsdp" and shards > _MANY:
        course = _deep(model, fewer(job, setting, _MANY)).scaled(_MANY / shards)
    else:
        course = _deep(model, same(job, setting))
    return _sum_up(course, model.parameters)


def _deep(model: Model, world: StandIn, *, checked: bool = True) -> Course:
    """The course of the whole model, from shallow ones where that can be; ``checked`` by one more of them."""
    recipe, modules, stack = model.recipe, model.modules, model.stack
    if stack is not None and world.job.parallel.pipeline == 1:
        shallow: list[Course] = []
        for depth in _DEPTHS if checked else _DEPTHS[:2]:
            with cut_to(modules, stack, depth):
                shallow.append(follow(Shallow(recipe, stack, depth), modules, world))
        low, high = shallow[:2]
        deep = along(low, high, stack.depth - _DEPTHS[1])
        again = along(low, high, _DEPTHS[2] - _DEPTHS[1])
        if deep is not None and again is not None:
            seen = shallow[-1].peak() if checked else again.peak()
            if abs(again.peak() - seen) <= _APART * seen:
                return deep
    return follow(recipe, modules, world)


def _sum_up(course: Course, parameters: int) -> Footprint:
    peaks: dict[str, dict[str, float]] = {}
    seconds = flops = 0.0
    sent: dict[tuple[str, int, int], tuple[float, float]] = {}
    for section, times in course.sections:
        found = _by_kind(section.peak)
        if section.name not in peaks or sum(found.values()) > sum(peaks[section.name].values()):
            peaks[section.name] = found
        seconds += section.seconds * times
        flops += section.flops * times
        for key, size in section.sent.items():
            before, messages = sent.get(key, (0.0, 0.0))
            sent[key] = before + size * times, messages + section.messages[key] * times
    return Footprint(
        peaks, _by_kind(course.held), seconds, flops, [(key, *pair) for key, pair in sorted(sent.items())], parameters
    )


def _by_kind(sizes: Sequence[float]) -> dict[str, float]:
    return {str(kind): size for kind, size in zip(KINDS, sizes, strict=True)}


def look(job: Job, model: Model) -> dict[str, Any]:
    """What a sample of the job's data consists of, how many there are, and how large the model is.

    Raises:
        JobError: the data are not there, or not what the job says.
    """
    source = open_source(job.data)
    parts = split_source(source, job.data.split)
    fields = source.fetch(np.zeros(1, dtype=np.int64))
    weights = [weight for module in model.modules.values() for weight in module.parameters()]
    return {
        "samples": {
            name: {"shape": list(value.shape[1:]), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in fields.items()
        },
        "counts": {name: len(indices) for name, indices in parts.items()},
        "parameters": model.parameters,
        "bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "units": any(model.recipe.layout(name).units for name in model.modules),
    }


def answer(request: dict[str, Any], models: Models) -> dict[str, Any]:
    """What a request asks for: to look at a job, or for a footprint; or the problems, as JSON has them."""
    try:
        job = Job.model_validate(request["job"])
        model = models.of(job)
        return look(job, model) if request["ask"] == "look" else asdict(footprint(job, _setting(request), model))
    except JobError as error:
        return {"problems": [asdict(problem) for problem in error.problems]}
    except Exception as error:  # a user's recipe may raise anything
        what = f"a step of it cannot be followed without its values: {type(error).__name__}: {error}"
        return {"problems": [asdict(Problem(what, "recipe"))]}


def _setting(request: dict[str, Any]) -> Setting:
    device = dict(request["device"])
    rates = Rates(**device.pop("rates"))
    samples = {name: Sample(tuple(s["shape"]), s["dtype"]) for name, s in request["samples"].items()}
    return Setting(
        world=request["world"],
        rank=request["rank"],
        per_node=request["per_node"],
        samples=samples,
        evaluated=request["evaluated"],
        device=Device(rates, device["gpu"], tuple(device["fused"]), tuple(device["grouped"])),
    )


def main() -> None:
    """Answer requests until standard input ends. What is printed meanwhile goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path.insert(0, str(Path.cwd()))
    models = Models()
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line), models)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
