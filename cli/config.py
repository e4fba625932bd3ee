"""``dltrain config``: the resolved job, the schema of job files, a starter file."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..core.config import DEFAULT, ResolvedJob, job_values, load_job
from ..core.document import parse_value
from ..core.errors import JobError
from ..core.job import Job
from ..core.schema import Path as Key
from ..core.schema import expected, members, section_of
from ..models.registry import RECIPES
from .arguments import job_target
from .render import dim
from .starter import write_starter

#: Values that a starter file sets; the others are there as comments.
_SHOWN = (
    ("name",),
    ("recipe",),
    ("data", "source"),
    ("train", "epochs"),
    ("train", "global_batch"),
    ("train", "optimizer", "lr"),
    ("resources", "nodes"),
)
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./:@+-]*[A-Za-z0-9_/]|[A-Za-z_]")
_WIDTH = 100
_COLUMN = 48


def show_job(target: Sequence[str], *, as_json: bool) -> None:
    """Print the job that ``target`` (a job file and overrides) and the environment resolve to.

    Raises:
        JobError: with every problem of the job.
    """
    named = job_target(target)
    if named.problems:
        raise JobError(*named.problems)
    resolved = load_job(named.job_file, named.overrides, {}, os.environ, recipes=RECIPES)
    if as_json:
        path = None if resolved.path is None else str(resolved.path)
        answer = {"file": path, "job": resolved.job.model_dump(mode="json"), "origins": dict(resolved.origins)}
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in resolved_yaml(resolved, note=named.note)))


def print_schema() -> None:
    """Print the JSON schema (draft 2020-12) of job files."""
    sys.stdout.write(json.dumps(job_schema(), indent=2) + "\n")


def init_job(path: Path, *, force: bool) -> None:
    """Write a starter file to ``path``; an existing one is replaced only with ``force``.

    Raises:
        JobError: the file exists, or it cannot be written.
    """
    write_starter(path, "\n".join(starter()) + "\n", name="dltrain.yaml", force=force)
    sys.stdout.write(f"wrote {path}\n\nnext:\n  dltrain config show {path}\n  dltrain launch {path}\n")


def resolved_yaml(resolved: ResolvedJob, *, note: str = "") -> Iterator[str]:
    """The job as YAML that loads back to it, each value with its origin as a comment."""
    if note:
        yield dim(f"# {note}", sys.stdout)
    yield from commented_yaml((key, value, resolved.origins[".".join(key)]) for key, value in job_values(resolved.job))


def commented_yaml(values: Iterable[tuple[Key, Any, str]]) -> Iterator[str]:
    """Values by key path as YAML, each with its comment, those of a section one after another."""
    rows: list[tuple[str, str]] = []
    above: tuple[str, ...] = ()
    for key, value, comment in values:
        shared = next((i for i, (a, b) in enumerate(zip(above, key[:-1], strict=False)) if a != b), None)
        start = min(len(above), len(key) - 1) if shared is None else shared
        rows += [("  " * depth + f"{yaml_value(key[depth])}:", "") for depth in range(start, len(key) - 1)]
        above = key[:-1]
        rows.append(("  " * len(above) + f"{yaml_value(key[-1])}: {yaml_value(value)}", comment))
    column = max((len(text) for text, comment in rows if comment and len(text) <= _COLUMN), default=0)
    for text, origin in rows:
        comment = f"  # {origin}"
        shown = dim(comment, sys.stdout) if origin == DEFAULT else comment
        yield f"{text:<{column}}{shown}" if origin else text


def job_schema() -> dict[str, Any]:
    """The JSON schema of job files: the models', and a section or mapping may also be empty."""
    schema = Job.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        for field in model["properties"].values():
            if "$ref" in field:
                field["anyOf"] = [{"$ref": field.pop("$ref")}, {"type": "null"}]
            elif field.get("type") == "object":
                field["type"] = ["object", "null"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dltrain job"}


def starter() -> Iterator[str]:
    """The lines of a starter file: every key with its description and default, most of them commented out."""
    yield "# A dltrain job. Run it with: dltrain launch dltrain.yaml"
    yield "# Every key is optional; what is commented out (#key: value) shows the default."
    yield "# For completion in editors: dltrain config schema > dltrain.schema.json"
    yield "# yaml-language-server: $schema=dltrain.schema.json"
    yield from _starter_section(Job, ())


def _starter_section(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[str]:
    indent = "  " * len(prefix)
    for name, field in model.model_fields.items():
        key, section = (*prefix, name), section_of(field)
        if not prefix:
            yield ""
        yield from textwrap.wrap(
            _description(field), _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        if section is None:
            default = field.get_default(call_default_factory=True, validated_data={})
            yield f"{indent}{'' if key in _SHOWN else '#'}{name}: {yaml_value(default)}"
        else:
            yield f"{indent}{name}:"
            yield from _starter_section(section, key)


def _description(field: FieldInfo) -> str:
    """The description, with the choices it does not name itself."""
    text = " ".join((field.description or "").split())
    choices = [c for member in members(field.annotation) if get_origin(member) is Literal for c in get_args(member)]
    named = all(f"'{choice}'" in text for choice in choices)
    return text if named else f"{text} [{expected(field.annotation, field.metadata)}]"


def yaml_value(value: Any) -> str:
    """``value`` in one line of YAML 1.2: plain where that reads back as the same, else quoted; flow collections."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float() if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
        case int() | float():
            return repr(value)
        case str():
            return value if _PLAIN.fullmatch(value) and parse_value(value) == value else _quoted(value)
        case dict():
            items = cast("dict[str, Any]", value).items()
            return "{" + ", ".join(f"{yaml_value(key)}: {yaml_value(item)}" for key, item in items) + "}"
        case _:
            return "[" + ", ".join(yaml_value(item) for item in value) + "]"


def _quoted(text: str) -> str:
    """A double-quoted YAML scalar; JSON's escapes would split characters beyond U+FFFF."""
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
