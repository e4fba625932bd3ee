"""Objects that users name as ``module:Name``: looked for without importing anything, and imported for real.

The check before a launch reads the source only, so that it costs milliseconds and runs none of the user's code; the
ranks import for real.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from .errors import JobError, Problem, did_you_mean
from .suggest import nearest


def find_object(spec: str, where: str = "") -> None:
    """Check that ``spec`` (``"module:Name"``) exists, without importing the module or its parents.

    The working directory is searched first, as ``python -m`` does. A module without Python source, with a module-level
    ``__getattr__`` or with a star import is believed to have the name.

    Raises:
        JobError: no such module, a syntax error in it, or no such name at its top level.
    """
    module, name = _split(spec, where)
    found = _find_module(module, where)
    if found.origin is None or not found.origin.endswith(".py"):
        return
    names = _top_level_names(Path(found.origin), where)
    if name.partition(".")[0] not in names and not names & {"*", "__getattr__"}:
        hint = did_you_mean(name, (n for n in names if not n.startswith("_")))
        raise JobError(Problem(f"{_shown(found.origin)} has no '{name}'", where, hint))


def load_object(spec: str, where: str = "") -> Any:
    """Import the module of ``spec`` (``"module:Name"``) and return the object.

    Puts the working directory on ``sys.path`` when it is missing there.

    Raises:
        JobError: as :func:`find_object`, or the import failed; then with the user's own part of the traceback.
    """
    module, name = _split(spec, where)
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if module not in sys.modules:
        _find_module(module, where)
    try:
        value: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise JobError(Problem(f"importing {module} failed\n{_users_traceback(error)}", where)) from error
    for part in name.split("."):
        if not hasattr(value, part):
            hint = did_you_mean(part, (n for n in dir(value) if not n.startswith("_")))
            raise JobError(Problem(f"module {module} has no '{name}'", where, hint))
        value = getattr(value, part)
    return value


def _split(spec: str, where: str) -> tuple[str, str]:
    module, _, name = spec.partition(":")
    path = Path(module)
    if path.suffix == ".py" or "/" in module:
        dotted = ".".join(path.with_suffix("").parts)
        raise JobError(Problem(f"'{module}' is a path, not a module", where, f"write '{dotted}:{name or 'Name'}'"))
    if not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
        raise JobError(Problem(f"'{spec}' names no object", where, "write 'module:Name'"))
    return module, name


def _find_module(module: str, where: str) -> ModuleSpec:
    """The spec of a module by its finders, parents first; none of them is imported."""
    importlib.invalidate_caches()
    search: Sequence[str] | None = None
    found: ModuleSpec | None = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        found = _ask_finders(name, search)
        if found is None:
            raise JobError(Problem(f"no module named '{name}'", where, _module_hint(parts[depth - 1], search)))
        if found.submodule_search_locations is None and depth < len(parts):
            raise JobError(Problem(f"'{name}' is a module, not a package", where, f"write '{name}:Name'"))
        search = list(found.submodule_search_locations or ())
    assert found is not None
    return found


def _ask_finders(name: str, search: Sequence[str] | None) -> ModuleSpec | None:
    if search is None:
        found = PathFinder.find_spec(name, [str(Path.cwd())])
        if found is not None:
            return found
    for finder in sys.meta_path:
        found = finder.find_spec(name, search)
        if found is not None:
            return found
    return None


def _module_hint(name: str, search: Sequence[str] | None) -> str:
    if name == "__main__":
        return "ranks cannot import the main program: put the class into a module of its own"
    here = search is None
    folders = [str(Path.cwd())] if search is None else list(search)
    near = nearest(name, (module.name for module in pkgutil.iter_modules(folders)))
    if near is not None:
        return f"did you mean '{near}'?"
    return f"looked in {folders[0]} and on the Python path" if here else f"looked in {', '.join(folders)}"


def _top_level_names(path: Path, where: str) -> set[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the user's string escapes; the real import shows them
            tree = ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        what = f"{_shown(str(path))}:{error.lineno}: {error.msg}"
        raise JobError(Problem(f"syntax error in {what}", where, (error.text or "").strip())) from None
    except (OSError, ValueError) as error:
        raise JobError(Problem(f"{_shown(str(path))} cannot be read: {error}", where)) from None
    collector = _Names()
    collector.visit(tree)
    return collector.names


class _Names(ast.NodeVisitor):
    """Names that a module's top level binds, also below ``if``, ``try``, ``with`` and loops."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.names.add(node.name)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.names.add(node.name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.add(node.name)

    def visit_Import(self, node: ast.Import) -> None:
        self.names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.names.update(alias.asname or alias.name for alias in node.names)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.names.add(node.id)

    def _skip(self, node: ast.AST) -> None:
        """Scopes of their own bind nothing here."""

    visit_Lambda = visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _skip


def _users_traceback(error: BaseException) -> str:
    """The traceback without the frames of the import machinery and of this module, causes included."""
    trace = traceback.TracebackException.from_exception(error)
    part: traceback.TracebackException | None = trace
    while part is not None:
        kept = [frame for frame in part.stack if not _is_machinery(frame.filename)]
        part.stack = traceback.StackSummary.from_list(kept)
        part = part.__cause__ or part.__context__
    return "".join(trace.format()).rstrip()


def _is_machinery(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen importlib")


def _shown(filename: str | Path) -> str:
    """The path as a user would write it: relative when it lies below the working directory."""
    path, here = Path(filename), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
