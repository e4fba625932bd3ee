"""Load a job file written for the test into the working directory, and look at what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from dltrain.core.config import ResolvedJob, load_job
from dltrain.core.errors import JobError, Problem


def load(text: str | None = None, *overrides: str, recipes: tuple[str, ...] = ("cnn",), **environ: str) -> ResolvedJob:
    path = None
    if text is not None:
        assert not Path("pyproject.toml").exists(), "not into the checkout: use the fixture empty_folder"
        path = Path("dltrain.yaml")
        path.write_text(text, encoding="utf-8")
    return load_job(path, overrides, {}, environ, recipes=recipes)


def problems(text: str | None = None, *overrides: str, **environ: str) -> list[Problem]:
    with pytest.raises(JobError) as caught:
        load(text, *overrides, **environ)
    return list(caught.value.problems)


def problem(text: str | None = None, *overrides: str, **environ: str) -> Problem:
    found = problems(text, *overrides, **environ)
    assert len(found) == 1, found
    return found[0]
