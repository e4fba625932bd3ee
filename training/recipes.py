"""From a job's ``recipe`` and ``model`` to a recipe object, with errors a user can act on."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..core.contracts import Recipe
from ..core.errors import JobError, Problem, did_you_mean
from ..core.importing import load_object
from ..core.job import Job
from ..core.schema import explain, word_detail
from ..models.registry import RECIPES

_METHODS = ("parts", "layout", "loss", "metrics")


def load_recipe(job: Job) -> Recipe:
    """The recipe that the job names, constructed with the job's ``model`` arguments.

    Raises:
        JobError: there is no such recipe, it does not import, or it refuses its arguments.
    """
    factory = _find(job.recipe)
    try:
        recipe = factory(**job.model)
    except ValidationError as error:
        raise JobError(*_problems(error, factory, job.model)) from None
    except TypeError as error:
        raise JobError(Problem(f"{job.recipe} does not take these arguments: {error}", "model")) from error
    missing = [name for name in _METHODS if not callable(getattr(recipe, name, None))]
    if missing:
        raise JobError(Problem(f"{job.recipe} has no method {', '.join(missing)}", "recipe", "see dltrain.Recipe"))
    return recipe


def build_parts(recipe: Recipe) -> dict[str, nn.Module]:
    """The recipe's parts, without memory for their weights where the recipe allows that."""
    with contextlib.suppress(Exception), torch.device("meta"):
        return recipe.parts()
    return recipe.parts()  # one that reads a tensor's value while it builds cannot do so on the meta device


def outline(job: Job) -> dict[str, Tensor]:
    """The weights and buffers that a checkpoint of the job has, as tensors that may have no memory.

    By fully qualified name, ``model.<part>.<fqn>``; a weight that has two names is the same object under both.

    Raises:
        JobError: as :func:`load_recipe`, or the recipe's parts cannot be built.
    """
    recipe = load_recipe(job)
    try:
        parts = build_parts(recipe)
    except Exception as error:  # a user's recipe may raise anything
        raise JobError(Problem(f"{job.recipe} cannot be built: {error!r}", "recipe")) from error
    states = {part: module.state_dict(keep_vars=True) for part, module in parts.items()}
    return {f"model.{part}.{fqn}": tensor for part, state in states.items() for fqn, tensor in state.items()}


def _problems(error: ValidationError, factory: Any, model: dict[str, Any]) -> Iterator[Problem]:
    """A recipe's refusal of its arguments in users' words; ``factory.Config`` is the pydantic model, if it has one."""
    config = getattr(factory, "Config", None)
    if config is None or error.title != config.__name__:
        for detail in error.errors(include_url=False):
            yield Problem(word_detail(detail), ".".join(["model", *map(str, detail["loc"])]))
        return
    for path, problem in explain(error, config, model):
        yield replace(problem, where=".".join(["model", *path]))


def _find(name: str) -> Any:
    if ":" in name:
        return load_object(name, "recipe")
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES) + " Your own is written 'my_module:MyRecipe'."
        raise JobError(Problem(f"there is no recipe {name!r}", "recipe", hint))
    module, attribute = RECIPES[name]
    return getattr(importlib.import_module(f"..models.{module}", __package__), attribute)
