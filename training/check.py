"""Everything about a job that only running its code can tell, tried before any rank starts."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from ..core.errors import JobError, Problem
from ..core.job import Job
from ..core.zero import check_zero
from ..data.sources import open_source
from ..data.split import split_source
from ..strategies.build import check_parts
from . import recipes
from .recipes import build_parts, load_recipe


def check_job(data: dict[str, Any]) -> list[Problem]:
    """Look for what the strategy needs on this machine, build the recipe, open the data and split it: the problems."""
    sys.path.insert(0, str(Path.cwd()))
    job = Job.model_validate(data)
    problems: list[Problem] = list(check_zero(job, None))
    for check in (_check_recipe, _check_data):
        try:
            check(job)
        except JobError as error:
            problems.extend(error.problems)
    return problems


def _check_recipe(job: Job) -> None:
    try:
        recipe = load_recipe(job)
        parts = build_parts(recipe)
        check_parts(job, recipe, parts)
    except JobError:
        raise
    except Exception as error:  # a user's recipe may raise anything
        raise JobError(Problem(f"{job.recipe} cannot be built\n{_users_traceback(error)}", "recipe")) from error
    if not parts:
        raise JobError(Problem(f"{job.recipe} has no parts to train", "recipe"))


def _users_traceback(error: Exception) -> str:
    """The traceback from the first frame that is not ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, recipes.__file__):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def _check_data(job: Job) -> None:
    source = open_source(job.data)
    split_source(source, job.data.split)
