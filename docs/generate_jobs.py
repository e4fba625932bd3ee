"""Write the tables of docs/jobs.md from the job's schema, the built-in recipes' arguments and the built-in data.

python docs/generate_jobs.py            write them
python docs/generate_jobs.py --check    exit with 1 if they are not up to date
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dltrain.cli.config import yaml_value
from dltrain.core.job import Job
from dltrain.core.schema import expected, section_of
from dltrain.core.spec import Duration
from dltrain.data.builtin import BUILT_IN
from dltrain.models.registry import RECIPES
from pydantic import BaseModel, PlainValidator
from pydantic.fields import FieldInfo

PAGE = Path(__file__).with_name("jobs.md")
BEGIN, END = "<!-- tables: python docs/generate_jobs.py -->\n", "<!-- end of the tables -->\n"


def tables() -> Iterator[str]:
    """The lines of the tables: one per section of the job, one per built-in recipe, and the built-in data."""
    yield from section(Job, "")
    for recipe, (module, attribute) in RECIPES.items():
        config: type[BaseModel] = getattr(importlib.import_module(f"dltrain.models.{module}"), attribute).Config
        yield from (f"### `model` of the recipe `{recipe}`", "", words(config.__doc__), "")
        yield from table(config)
    yield from ("### Built-in data", "", "| `data.source` | what it is |", "|---|---|")
    yield from (f"| `{name}` | {cell(source.what)} |" for name, source in BUILT_IN.items())
    yield ""
    for name, source in BUILT_IN.items():
        if source.options.model_fields:
            yield from (f"### `data.options` of `{name}`", "")
            yield from table(source.options)


def section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """The table of ``model``, and those of the sections in it, named by their dotted key."""
    yield from (f"### `{prefix}`" if prefix else "### The job", "")
    yield from table(model)
    for name, field in model.model_fields.items():
        below = section_of(field)
        if below is not None:
            yield from section(below, f"{prefix}.{name}" if prefix else name)


def table(model: type[BaseModel]) -> Iterator[str]:
    yield from ("| key | value | default | meaning |", "|---|---|---|---|")
    for name, field in model.model_fields.items():
        if section_of(field) is None:
            default = yaml_value(field.get_default(call_default_factory=True, validated_data={}))
            yield f"| `{name}` | {cell(kind(field))} | `{default}` | {cell(words(field.description))} |"
        else:
            yield f"| `{name}` | a section | | {cell(words(field.description))} |"
    yield ""


def kind(field: FieldInfo) -> str:
    """What may stand there, in words."""
    duration = "a number of seconds, or like `30s`, `10min`, `1.5h`"
    if any(isinstance(entry, PlainValidator) for entry in field.metadata):
        return duration
    if field.annotation == Duration | Literal["auto", "never"]:
        return f"{duration}; 'auto' or 'never'"
    return re.sub(r"that matches (\S+)", r"that matches `\1`", expected(field.annotation, field.metadata))


def words(text: str | None) -> str:
    return " ".join((text or "").split())


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of docs/jobs.md.")
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + BEGIN + "\n" + "\n".join(tables()) + "\n" + END + after
    if check and page != wanted:
        print(f"{PAGE.name} is not up to date: run python docs/generate_jobs.py", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
