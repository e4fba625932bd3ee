"""What the check before a launch refuses: recipes that do not build, data that does not open."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest
from dltrain.core.errors import Problem
from dltrain.core.job import Job
from dltrain.training.check import check_job


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def check(parts: str, *, init: str = "pass", **model: object) -> list[Problem]:
    """The problems of a recipe whose ``__init__(self, width=1)`` and ``parts(self)`` have these bodies."""
    text = f"""
        import torch
        from torch import nn

        class Mine:
            def __init__(self, width=1):
                {init}
            def parts(self):
                {parts}
            def layout(self, part): ...
            def loss(self, part, parts, batch): ...
            def metrics(self, parts, batch): ...
    """
    sys.modules.pop("mine", None)
    Path("mine.py").write_text(dedent(text), encoding="utf-8")
    return check_job(Job(recipe="mine:Mine", model=model).model_dump(mode="json"))


def test_the_built_in_job_has_no_problem() -> None:
    assert check_job(Job().model_dump(mode="json")) == []


def test_a_recipe_is_built_without_memory_for_its_weights() -> None:
    assert check("return {'net': nn.Linear(1 << 20, 1 << 20)}") == []  # 4 TiB


def test_a_recipe_that_needs_values_while_it_is_built_is_built_for_real() -> None:
    assert check("return {'net': nn.Dropout(torch.linspace(0, 0.5, 2)[1].item())}") == []


def test_what_a_recipe_raises_is_shown_with_the_users_part_of_the_traceback() -> None:
    (problem,) = check("raise ValueError('no such layer')")
    assert problem.where == "recipe"
    assert "ValueError: no such layer" in problem.what
    assert "mine.py" in problem.what
    assert "check.py" not in problem.what


def test_so_is_what_its_constructor_raises() -> None:
    (problem,) = check("return {}", init="raise KeyError('width')")
    assert "KeyError: 'width'" in problem.what
    assert "recipes.py" not in problem.what


def test_arguments_that_a_recipe_does_not_take_are_the_models_problem() -> None:
    (problem,) = check("return {'net': nn.Linear(1, 1)}", depth=3)
    assert problem.where == "model"
    assert "depth" in problem.what


def test_a_recipe_without_parts_has_nothing_to_train() -> None:
    (problem,) = check("return {}")
    assert "no parts" in problem.what


def test_the_data_is_opened_too() -> None:
    data = Job().model_dump(mode="json") | {"data": {"source": "nowhere.npz"}}
    (problem,) = check_job(data)
    assert problem.where == "data.source"
