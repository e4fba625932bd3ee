"""The house as a test: which folders there are, who may import whom, and what a file may look like.

The floors are those of docs/architecture.md. Imports are read from the source, wherever in a file they stand.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "core": 0,
    **dict.fromkeys(("models", "data", "strategies", "checkpoint", "tracking"), 1),
    "training": 2,
    "launcher": 3,
    "cli": 5,
}
NOT_PACKAGES = {"benchmarks", "docs", "examples", "tests"}
LONGEST_FILE = 400


@dataclass(frozen=True)
class Import:
    """One module that a module names: ``name`` in full, ``checking`` where only type checkers see it."""

    name: str
    line: int
    checking: bool


@cache
def modules() -> dict[str, Path]:
    """The package's modules by dotted name, such as ``dltrain.core.job``."""
    files = [ROOT / "__init__.py", *(path for folder in FLOORS for path in sorted((ROOT / folder).rglob("*.py")))]
    found: dict[str, Path] = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(("dltrain", *(part for part in parts if part != "__init__")))] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports(module: str) -> list[Import]:
    """Everything that ``module`` imports, relative names resolved; ``import_module("literal")`` too."""
    return list(_imports(module))


def _imports(module: str) -> Iterator[Import]:
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, checking in walk(tree(path), checking=False):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, checking) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve(package, "." * node.level + (node.module or ""))
            for alias in node.names:
                below = f"{base}.{alias.name}"
                yield Import(below if below in modules() else base, node.lineno, checking)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant)]
            yield from (Import(resolve(package, name), node.lineno, checking) for name in names)


def walk(node: ast.AST, *, checking: bool) -> Iterator[tuple[ast.AST, bool]]:
    """The nodes below ``node``, and whether they stand under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        under = checking
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            under = checking or child in node.body
        yield child, under
        yield from walk(child, checking=under)


def resolve(package: str, name: str) -> str:
    """A name as an import statement in ``package`` writes it, in full."""
    dots = len(name) - len(name.lstrip("."))
    if not dots:
        return name
    base = package.split(".")[: len(package.split(".")) - dots + 1]
    return ".".join([*base, *filter(None, [name.lstrip(".")])])


def folder(module: str) -> str:
    """The folder of a dltrain module: ``core`` for ``dltrain.core.job``; empty for the root."""
    return module.partition(".")[2].partition(".")[0]


def test_imports_point_down() -> None:
    wrong: list[str] = []
    for module in modules():
        home = folder(module)
        for imported in imports(module):
            if imported.name.partition(".")[0] != "dltrain" or not home:
                continue
            target = folder(imported.name)
            if target and target != home and FLOORS[target] >= FLOORS[home]:
                wrong.append(f"{module}:{imported.line} imports {imported.name}")
    assert not wrong


def test_imports_inside_the_package_are_relative() -> None:
    absolute = [
        f"{module}:{node.lineno}"
        for module, path in modules().items()
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "dltrain")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "dltrain" for alias in node.names))
    ]
    assert not absolute


def test_there_are_no_circles() -> None:
    graph = {
        module: {i.name for i in imports(module) if not i.checking and i.name in modules() and i.name != "dltrain"}
        for module in modules()
        if module != "dltrain"
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("ray", {"launcher"}),
        ("wandb", {"tracking"}),
        ("typer", {"cli"}),
        ("torch", {"models", "data", "strategies", "checkpoint", "training", "launcher"}),
    ],
)
def test_a_library_stays_where_it_belongs(package: str, allowed: set[str]) -> None:
    users = {
        f"{module}:{i.line}"
        for module in modules()
        for i in imports(module)
        if i.name.partition(".")[0] == package and not i.checking and folder(module) not in allowed
    }
    assert not users


def test_training_does_not_know_ray_even_by_its_types() -> None:
    assert not [i for m in modules() if folder(m) == "training" for i in imports(m) if i.name.startswith("ray")]


def test_the_controllers_side_reaches_torch_only_in_the_processes_it_forks() -> None:
    users = {m for m in modules() if folder(m) == "launcher" for i in imports(m) if i.name.split(".")[0] == "torch"}
    assert users == {"dltrain.launcher.entry", "dltrain.launcher.script"}


def test_core_loads_neither_torch_nor_ray() -> None:
    names = [name for name in modules() if folder(name) == "core"]
    program = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "ray"} & set(done.stdout.split())


def test_the_packages_are_the_folders() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    with_code = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    rooms = [
        f"{path.parent.parent.name}.{path.parent.name}"
        for name in FLOORS
        for path in ROOT.glob(f"{name}/*/__init__.py")
    ]
    assert said == ["dltrain", *(f"dltrain.{name}" for name in sorted([*FLOORS, *rooms]))]
    assert with_code - NOT_PACKAGES == set(FLOORS), "a folder with code is a floor of the house, or none of the package"
    assert all((ROOT / name / "__init__.py").is_file() for name in FLOORS)
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_the_picture_shows_the_floors() -> None:
    picture = (ROOT / "docs" / "floors.svg").read_text(encoding="utf-8")
    shown = {name: int(y) for y, name in re.findall(r'<text class="name" x="\d+" y="(\d+)">(\w+)</text>', picture)}
    levels = {int(number): int(y) for y, number in re.findall(r'y="(\d+)">floor (\d)</text>', picture)}
    assert {name: y - levels[FLOORS[name]] for name, y in shown.items()} == dict.fromkeys(FLOORS, 1)


def test_the_root_says_where_every_public_name_lives() -> None:
    import dltrain

    assert sorted(dltrain.__all__) == dltrain.__all__ == sorted(dltrain._HOMES)
    assert set(dltrain._HOMES.values()) <= {name.removeprefix("dltrain") for name in modules()}
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert dltrain.__version__ == said


def test_no_file_is_too_long() -> None:
    folders = [*FLOORS, "benchmarks", "docs", "examples"]
    files = [ROOT / "__init__.py", *(path for name in folders for path in (ROOT / name).rglob("*.py"))]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length >= LONGEST_FILE}


def test_what_checkers_are_told_to_overlook_has_a_reason() -> None:
    told = re.compile(r"#\s*(?:noqa|pyright: ?ignore|type: ?ignore)(?:\[[^]]*\]|: ?[A-Z0-9, ]+)?(?P<rest>.*)")
    bare = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in modules().values()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if (match := told.search(line)) and "#" not in match["rest"]
    ]
    assert not bare


def public(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """The public functions and classes at the top of a module, and the public methods of those classes."""
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                methods = (m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_"))
                yield from ((f"{node.name}.{method.name}", method) for method in methods)


def test_modules_say_what_they_are_for() -> None:
    silent = [m for m, path in modules().items() if path.stat().st_size and not ast.get_docstring(tree(path))]
    assert not silent


def test_docstrings_name_arguments_that_exist() -> None:
    """An ``Args:`` section may leave parameters out; it may not name any that are not there."""
    wrong: list[str] = []
    for module, path in modules().items():
        for name, node in public(path):
            for argument in documented(node, "Args"):
                if argument not in parameters(node):
                    wrong.append(f"{module}.{name} has no parameter {argument}")
    assert not wrong


def test_docstrings_name_attributes_that_exist() -> None:
    wrong: list[str] = []
    for module, path in modules().items():
        for name, node in public(path):
            if isinstance(node, ast.ClassDef):
                there = attributes(node)
                wrong += [f"{module}.{name} has no {a}" for a in documented(node, "Attributes") if a not in there]
    assert not wrong


def test_functions_that_refuse_a_request_say_so() -> None:
    """A public function with ``raise JobError`` or ``RunFailed`` in it has the name in its docstring."""
    silent: list[str] = []
    for module, path in modules().items():
        for name, node in public(path):
            if isinstance(node, ast.FunctionDef):
                raised = {n.exc.func.id for n in ast.walk(node) if is_raise(n)} & {"JobError", "RunFailed"}
                silent += [f"{module}.{name}: {e}" for e in raised if e not in (ast.get_docstring(node) or "")]
    assert not silent


def is_raise(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)


def documented(node: ast.FunctionDef | ast.ClassDef, section: str) -> list[str]:
    """The names that a section of the docstring describes (Google style: ``    name, other: what it is``)."""
    match = re.search(rf"^{section}:\n((?:[ \t]+.*\n?|\n)*)", ast.get_docstring(node) or "", re.MULTILINE)
    entries = re.findall(r"^ {4}([a-z_][\w, ]*):", match[1] if match else "", re.MULTILINE)
    return [name.strip() for entry in entries for name in entry.split(",")]


def parameters(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """The parameters of a function, or of a class: its ``__init__``'s, and the fields of a dataclass."""
    if isinstance(node, ast.ClassDef):
        own = {name for method in functions(node) if method.name == "__init__" for name in parameters(method)}
        return own | attributes(node)
    spec = node.args
    return {argument.arg for argument in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]}


def attributes(node: ast.ClassDef) -> set[str]:
    """Annotated names, properties, and what ``__init__`` sets on ``self``."""
    fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    init = (n for method in functions(node) if method.name == "__init__" for n in ast.walk(method))
    on_self = {n.attr for n in init if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"}
    return fields | on_self | {method.name for method in functions(node)}


def functions(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [child for child in node.body if isinstance(child, ast.FunctionDef)]
