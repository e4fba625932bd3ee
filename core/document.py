"""Job files as plain values with line numbers: YAML 1.2 (and so JSON), strictly.

Only the core schema's types exist: null, booleans ``true``/``false``, integers, floats (``1e-3`` is one), text. There
is no ``yes``/``no``, no dates, no tags, no merge keys, and a key given twice is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError

from .errors import JobError, Problem
from .suggest import JOB_SUFFIXES, similar_files

_TAG = "tag:yaml.org,2002:"
#: What ruamel gives to nodes without a tag, and the core schema's own.
_TAGS = [_TAG + kind for kind in ["bool", "float", "int", "map", "merge", "null", "seq", "str", "timestamp", "value"]]
_FLOW_START = ("[", "{", '"', "'")


@dataclass
class Document:
    """A parsed file: nested dicts, lists and scalars, and the line (counted from 1) of every key path."""

    value: Any
    lines: dict[tuple[str, ...], int] = field(default_factory=dict[tuple[str, ...], int])


def read_document(path: Path) -> Document:
    """Read the YAML or JSON file at ``path``. An empty file gives the value None.

    Raises:
        JobError: it cannot be read, or it is not strict YAML; with line and column, every problem at once.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise JobError(Problem("no such file", str(path), similar_files(path, JOB_SUFFIXES))) from None
    except IsADirectoryError:
        raise JobError(Problem("this is a folder, not a job file", str(path))) from None
    except UnicodeDecodeError as error:
        raise JobError(Problem(f"not UTF-8 text (byte {error.start})", str(path))) from None
    except OSError as error:
        raise JobError(Problem(f"cannot be read: {error.strerror}", str(path))) from None
    return parse_document(text, str(path))


def parse_document(text: str, name: str) -> Document:
    """Parse YAML ``text``; ``name`` is what messages call it.

    Raises:
        JobError: as :func:`read_document`.
    """
    reader = _Reader(name)
    node = _compose(text, name)
    document = Document(None if node is None else reader.value(node, ()), reader.lines)
    if reader.problems:
        raise JobError(*reader.problems)
    return document


def parse_value(text: str) -> Any:
    """The value of ``text`` as written in ``key=value``: a flow collection, a quoted text, or a plain scalar.

    A plain scalar is taken whole (``run #3: a`` is just that text), because no shell user means a YAML comment.

    Raises:
        JobError: an unclosed bracket or quote, or another fault inside a flow collection.
    """
    stripped = text.strip()
    if stripped.startswith(_FLOW_START):
        return parse_document(stripped, "").value
    return _scalar(_resolve(stripped), stripped)


def _compose(text: str, name: str) -> Any:
    """The root node of ``text``, or None. ruamel's nodes carry no types, so they are Any here."""
    yaml: Any = YAML(typ="safe", pure=True)
    try:
        return yaml.compose(text)
    except MarkedYAMLError as raised:
        error: Any = raised
        mark = error.problem_mark or error.context_mark
        place = _place(name, mark.line, mark.column) if mark else name
        raise JobError(Problem(f"not valid YAML: {_fault(error)}", place, _remedy(error))) from None
    except ReaderError as raised:
        fault: Any = raised
        before = text[: fault.position]
        line, column = before.count("\n"), len(before) - (before.rfind("\n") + 1)
        raise JobError(Problem("a control character does not belong here", _place(name, line, column))) from None
    except YAMLError as error:
        raise JobError(Problem(f"not valid YAML: {error}", name)) from None
    except RecursionError:
        raise JobError(Problem("nested too deeply", name)) from None


def _fault(error: Any) -> str:
    """The parser's complaint in one line, without its internal names for tokens."""
    problem, context = error.problem or error.context or "cannot be parsed", error.context or ""
    if problem == "but found another document":
        return "a second document ('---') in the same file"
    if "<document start>" in problem:
        return "this does not fit what stands before it"
    if not error.problem or not context:
        return problem
    start, mark = error.context_mark, error.problem_mark
    since = f" that starts on line {start.line + 1}" if start and mark and start.line != mark.line else ""
    return f"{problem}, {context}{since}".replace("'<stream end>'", "the end")


def _remedy(error: Any) -> str:
    problem = error.problem or ""
    if "'\\t'" in problem:
        return "indent with spaces, not tabs"
    if "<document start>" in problem:
        return "check the indentation"
    if "cannot start any token" in problem or "undefined alias" in problem:
        return "put the text in quotes"
    return ""


def _place(name: str, line: int, column: int) -> str:
    return f"{name}:{line + 1}:{column + 1}" if name else f"column {column + 1}"


def _resolve(text: str) -> str:
    resolver: Any = YAML(typ="safe", pure=True).resolver
    return resolver.resolve(ScalarNode, text, (True, False))


def _scalar(tag: str, text: str) -> Any:
    """The value of a scalar of a core-schema tag; what is none of the core schema's is the text itself."""
    kind = str(tag).removeprefix(_TAG)
    digits = text.replace("_", "")
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(digits, 0 if digits.lstrip("+-")[:2].lower() in ("0x", "0o", "0b") else 10)
        if kind == "float":
            return float(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return text
    return text


class _Reader:
    """Turns one document's nodes into values, noting lines and problems on the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[tuple[str, ...], int] = {}
        self.problems: list[Problem] = []
        self._open: list[Any] = []

    def value(self, node: Any, path: tuple[str, ...]) -> Any:
        """The plain value of ``node``, which stands at ``path``."""
        if any(node is parent for parent in self._open):
            self._refuse(node, path, "an alias refers to what contains it")
            return None
        if str(node.tag) not in _TAGS:
            self._refuse(node, path, f"the tag {node.tag} means nothing here")
        if node.id == "scalar":
            return _scalar(str(node.tag), str(node.value)) if node.style is None else str(node.value)
        self._open.append(node)
        try:
            if node.id == "sequence":
                return [self.value(item, path) for item in node.value]
            return dict(self._items(node, path))
        finally:
            self._open.pop()

    def _items(self, node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key, item in node.value:
            text = str(key.value) if key.id == "scalar" else ""
            line = int(key.start_mark.line) + 1
            if key.id != "scalar":
                self._refuse(key, path, "a key must be text")
            elif text == "<<" and key.style is None:
                self._refuse(key, path, "merge keys ('<<') are not supported", "write the keys out")
            elif text in seen:
                self._refuse(key, (*path, text), f"given twice (first on line {seen[text]})")
            else:
                seen[text] = line
                self.lines.setdefault((*path, text), line)
                yield text, self.value(item, (*path, text))

    def _refuse(self, node: Any, path: tuple[str, ...], what: str, hint: str = "") -> None:
        place = f"{self.name}:{node.start_mark.line + 1}" if self.name else ""
        where = ": ".join(part for part in (place, ".".join(path)) if part)
        self.problems.append(Problem(what, where, hint))
