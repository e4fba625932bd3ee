"""``module:Name``: checked without importing, imported for real with the user's own traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dltrain.core.errors import JobError, Problem
from dltrain.core.importing import find_object, load_object


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def problem(spec: str) -> Problem:
    with pytest.raises(JobError) as caught:
        find_object(spec, "recipe")
    (only,) = caught.value.problems
    assert only.where == "recipe"
    return only


BINDINGS = """
import os.path as osp, collections.abc
from json import loads, dumps as to_text
class Klass: inner = 1
def function(): nested = 1
async def coroutine(): ...
assigned = other = 1
(first, [*rest]) = 1, [2]
typed: int = 3
if (walrus := 1):
    conditional = 1
try:
    tried = 1
except ImportError:
    fallback = 1
with open(__file__) as handle:
    for loop in ():
        looped = [comprehended for comprehended in ()]
"""


BOUND = (
    "osp collections loads to_text Klass function coroutine assigned other first rest typed walrus conditional tried"
)


@pytest.mark.parametrize("name", [*BOUND.split(), "tried", "fallback", "handle", "loop", "looped"])
def test_every_way_to_bind_a_name_at_the_top_level(name: str) -> None:
    write("mod.py", BINDINGS)
    find_object(f"mod:{name}", "recipe")


@pytest.mark.parametrize("name", ["nested", "inner", "comprehended", "abc", "json", "dumps"])
def test_names_of_inner_scopes_are_not_the_modules(name: str) -> None:
    write("mod.py", BINDINGS)
    assert problem(f"mod:{name}").what == f"mod.py has no '{name}'"


def test_nothing_is_imported() -> None:
    write("pkg/__init__.py", "raise SystemExit('imported')")
    write("pkg/sub/__init__.py", "raise SystemExit('imported')")
    write("pkg/sub/mod.py", "class Mine: ...\nraise SystemExit('imported')")
    find_object("pkg.sub.mod:Mine", "recipe")
    find_object("pkg.sub.mod:Mine.attribute", "recipe")
    assert not {"pkg", "pkg.sub", "pkg.sub.mod"} & set(sys.modules)


def test_packages_without_init_files_and_installed_modules_are_found() -> None:
    write("space/mod.py", "X = 1")
    find_object("space.mod:X", "recipe")
    find_object("json.decoder:JSONDecoder", "recipe")
    find_object("dltrain.core.job:Job", "recipe")
    find_object("math:sqrt", "recipe")  # no Python source: believed


@pytest.mark.parametrize("text", ["from os.path import *\n", "def __getattr__(name): ...\n"])
def test_names_made_at_run_time_are_believed(text: str) -> None:
    write("mod.py", text)
    find_object("mod:anything", "recipe")


@pytest.mark.parametrize(
    ("spec", "what", "hint"),
    [
        ("recepies:Mine", "no module named 'recepies'", "did you mean 'recipes'?"),
        ("pkg.modle:Mine", "no module named 'pkg.modle'", "did you mean 'model'?"),
        ("recipes.sub:Mine", "'recipes' is a module, not a package", "write 'recipes:Name'"),
        ("recipes:Mina", "recipes.py has no 'Mina'", "did you mean 'Mine'?"),
        ("recipes:Zzz", "recipes.py has no 'Zzz'", "known: Mine, Yours"),
        ("recipes.py:Mine", "'recipes.py' is a path, not a module", "write 'recipes:Mine'"),
        ("pkg/model.py:Mine", "'pkg/model.py' is a path, not a module", "write 'pkg.model:Mine'"),
        ("pkg/model:Mine", "'pkg/model' is a path, not a module", "write 'pkg.model:Mine'"),
        ("recipes:", "'recipes:' names no object", "write 'module:Name'"),
        (":Mine", "':Mine' names no object", "write 'module:Name'"),
        ("a:b:c", "'a:b:c' names no object", "write 'module:Name'"),
        ("broken:Mine", "syntax error in broken.py:2: expected ':'", "class Mine"),
        ("__main__:Mine", "no module named '__main__'", None),
    ],
)
def test_what_is_not_there(spec: str, what: str, hint: str | None) -> None:
    write("recipes.py", "class Mine: ...\nclass Yours: ...\n_private = 1\n")
    write("pkg/__init__.py", "")
    write("pkg/model.py", "class Mine: ...\n")
    write("broken.py", "x = 1\nclass Mine\n")
    found = problem(spec)
    assert found.what == what
    assert hint is None or found.hint == hint
    with pytest.raises(JobError):
        load_object(spec, "recipe")


def test_the_main_program_is_no_module_for_ranks() -> None:
    assert "put the class into a module of its own" in problem("__main__:Mine").hint


def test_loading_gives_the_object() -> None:
    write("recipes.py", "class Mine:\n    class Inner: ...\n")
    assert load_object("recipes:Mine").__name__ == "Mine"
    assert load_object("recipes:Mine.Inner").__qualname__ == "Mine.Inner"


def test_a_failing_import_shows_the_users_own_lines() -> None:
    write("helper.py", "def fail():\n    raise ValueError('boom')\n")
    write("recipes.py", "import helper\nhelper.fail()\nclass Mine: ...\n")
    find_object("recipes:Mine")
    with pytest.raises(JobError) as caught:
        load_object("recipes:Mine", "recipe")
    text = str(caught.value)
    assert text.startswith("recipe: importing recipes failed\n")
    assert 'recipes.py", line 2' in text
    assert 'helper.py", line 2' in text
    assert text.endswith("ValueError: boom")
    assert "importlib" not in text
    assert "importing.py" not in text


@pytest.mark.parametrize("line", ["import not_installed_anywhere", "raise SystemExit(3)", "1 / 0"])
def test_no_import_failure_escapes(line: str) -> None:
    write("recipes.py", f"{line}\nclass Mine: ...\n")
    with pytest.raises(JobError, match="importing recipes failed"):
        load_object("recipes:Mine", "recipe")


def test_a_name_that_only_the_import_can_miss() -> None:
    write("recipes.py", "class Mine: ...\ndel Mine\nOther = 1\n")
    find_object("recipes:Mine")
    with pytest.raises(JobError, match="module recipes has no 'Mine'"):
        load_object("recipes:Mine")


def test_of_many_names_the_first_are_listed() -> None:
    write("mod.py", "".join(f"name{number:02} = 1\n" for number in range(40)))
    assert problem("mod:Xyzzy").hint == f"known: {', '.join(f'name{number:02}' for number in range(30))}, …"
