"""A part cut into stages: consecutive runs of the submodules that its forward runs one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..core.contracts import DrawsSamples, Layout, Recipe
from ..core.errors import JobError, Problem, did_you_mean
from ..core.job import Job
from ..core.parallel import Parallel

_KEY = "parallel.pipeline"


class Stage(nn.Module):
    """Submodules of a part, run one after another: what the first is called with to what the last returns.

    Args:
        sends: whether that goes to another stage: it must be one tensor.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], *, sends: bool) -> None:
        super().__init__()
        self.steps = nn.ModuleList(module.get_submodule(name) for name in names)
        self._names, self._sends = tuple(names), sends

    def forward(self, *inputs: Any, **named: Any) -> Any:
        first, *others = self.steps
        value = first(*inputs, **named)
        for step in others:
            value = step(value)
        if not self._sends:
            return value
        if not isinstance(value, Tensor):
            what = f"'{self._names[-1]}' returned a {type(value).__name__}"
            raise TypeError(f"from one stage of a pipeline to the next goes one tensor, but {what}")
        # FSDP warns of a view, which could be written to through its base.
        return value.clone(memory_format=torch.contiguous_format) if value._is_view() else value.contiguous()

    def own(self, units: Sequence[str]) -> tuple[str, ...]:
        """Those of the part's ``units`` that lie in this stage, by their names in here."""
        return tuple(
            f"steps.{index}{unit[len(name) :]}"
            for unit in units
            for index, name in enumerate(self._names)
            if _within(unit, name)
        )


def divide(module: nn.Module, chain: Sequence[str], stages: int) -> list[tuple[str, ...]]:
    """``chain`` in ``stages`` runs, so that the largest has as few weights as can be.

    A run begins at a submodule with weights or buffers; what has none follows the one before it. ``module`` may be on
    the meta device.
    """
    groups = _groups(module, chain)
    sizes = [sum(p.numel() for name in group for p in module.get_submodule(name).parameters()) for group in groups]
    before = [0, *accumulate(sizes)]
    # best[n]: how to cut the first n groups into the stages so far: (the largest, how uneven they are, where they end)
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for _ in range(stages):
        best = {
            end: min(
                (max(largest, size := before[end] - before[begin]), uneven + size**2, (*ends, end))
                for begin, (largest, uneven, ends) in best.items()
                if begin < end
            )
            for end in range(min(best) + 1, len(groups) + 1)
        }
    ends = best[len(groups)][2]
    return [
        tuple(name for group in groups[begin:end] for name in group)
        for begin, end in zip((0, *ends[:-1]), ends, strict=True)
    ]


def keep(module: nn.Module, chain: Sequence[str], held: Sequence[str]) -> None:
    """Leave out of ``module`` what has weights or buffers and is not ``held``; all names stay what they are."""
    for name in chain:
        if name not in held and _holds(module.get_submodule(name)):
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, None)


def first_names(module: nn.Module) -> dict[str, str]:
    """The names of all weights, each with the first name of the same weight."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(weight), name) for name, weight in module.named_parameters(remove_duplicate=False)
    }


def holders(names: Mapping[str, str], runs: Sequence[Sequence[str]], ranks: int) -> dict[str, tuple[int, ...]]:
    """For each first name the ranks of the pipeline that hold the weight; stage ``i`` is on rank ``i % ranks``."""
    found: dict[str, set[int]] = {}
    for name, first in names.items():
        on = {stage % ranks for stage, run in enumerate(runs) if any(_within(name, step) for step in run)}
        found.setdefault(first, set()).update(on)
    return {first: tuple(sorted(on)) for first, on in found.items()}


def check_pipeline(job: Job, recipe: Recipe, parts: Mapping[str, nn.Module]) -> None:
    """Refuse a pipeline that the recipe's parts, which may be on the meta device, cannot be cut into.

    Raises:
        JobError: with the reason, and what would do.
    """
    if len(parts) > 1:
        what = f"{job.recipe} trains {len(parts)} parts in turn, and a pipeline has the stages of one"
        raise JobError(Problem(what, _KEY, "1 would do, with strategy: fsdp where memory is short"))
    if isinstance(recipe, DrawsSamples):
        what = f"{job.recipe} draws samples, for which a rank needs the whole model"
        raise JobError(Problem(what, _KEY, "1 would do, or a recipe without 'samples'"))
    for name, module in parts.items():
        layout = recipe.layout(name)
        if not layout.pipeline:
            what = f"the layout of {job.recipe} names no submodules that run one after another, to be cut into stages"
            raise JobError(Problem(what, _KEY, "1 would do, with strategy: fsdp where memory is short"))
        problems = list(_misfits(name, module, layout))
        if problems:
            raise JobError(*problems)
        _check_number(len(_groups(module, layout.pipeline)), job.parallel)
        _check_shared(module, layout, job.parallel)


def _misfits(part: str, module: nn.Module, layout: Layout) -> Iterator[Problem]:
    submodules = {name for name, _ in module.named_modules()} - {""}
    unknown = [name for name in layout.pipeline if name not in submodules]
    for name in unknown:
        what = f"the pipeline of part '{part}' has a submodule '{name}', which there is not"
        yield Problem(what, "recipe", did_you_mean(name, submodules))
    if unknown:
        return
    for name, _ in _state(module):
        times = sum(_within(name, step) for step in layout.pipeline)
        if times != 1:
            what = f"'{name}' of part '{part}' lies in {times or 'none'} of the submodules of its layout's pipeline"
            yield Problem(what, "recipe", "they must hold all weights and buffers, each once")
    for unit in layout.units:
        if unit in submodules and not any(_within(unit, step) for step in layout.pipeline):
            what = f"the unit '{unit}' of part '{part}' lies in none of the submodules of its layout's pipeline"
            yield Problem(what, "recipe", "units must be those submodules, or parts of them")


def _check_number(available: int, parallel: Parallel) -> None:
    if parallel.stages <= available:
        return
    what = f"{parallel.stages} stages need as many submodules with weights, and the layout's pipeline has {available}"
    if parallel.pipeline > available:
        raise JobError(Problem(what, _KEY, f"at most {available}"))
    chunks = available // parallel.pipeline
    hint = f"at most {chunks}" if chunks > 1 else "parallel.pipeline_schedule: 1f1b would do"
    raise JobError(Problem(what, "parallel.pipeline_chunks", hint))


def _check_shared(module: nn.Module, layout: Layout, parallel: Parallel) -> None:
    """A rank's stages are sharded one by one, so that none can lend a weight to another."""
    runs, stages = divide(module, layout.pipeline, parallel.stages), dict[str, set[int]]()
    for name, first in first_names(module).items():
        found = stages.setdefault(first, set())
        found |= {stage for stage, run in enumerate(runs) if any(_within(name, step) for step in run)}
        if len({stage % parallel.pipeline for stage in found}) < len(found):
            what = f"'{first}' and '{name}' are one weight in two stages of the same rank"
            raise JobError(Problem(what, "parallel.pipeline_schedule", "1f1b would do"))


def _groups(module: nn.Module, chain: Sequence[str]) -> list[list[str]]:
    """``chain`` with one submodule that has weights or buffers in each group, and those without that follow it."""
    groups: list[list[str]] = [[]]
    begun = False
    for name in chain:
        if _holds(module.get_submodule(name)):
            if begun:
                groups.append([])
            begun = True
        groups[-1].append(name)
    return groups


def _holds(module: nn.Module) -> bool:
    return next(_state(module), None) is not None


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _within(name: str, step: str) -> bool:
    return name == step or name.startswith(f"{step}.")
