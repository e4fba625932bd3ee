"""What a job file may say, read off the pydantic models: keys, sections, and types in users' words."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from .errors import Problem, did_you_mean
from .suggest import nearest

Path = tuple[str, ...]
_NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_WANTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "int_type": "a whole number",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "string_type": "text",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
}
_NUMBERS = (int, float)
_BOOL_WORDS = ("yes", "no", "on", "off", "y", "n")
_SHOWN = 60


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model below a field that is a section of its own, else None."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def is_free(field: FieldInfo) -> bool:
    """Whether the field holds a mapping with keys of the user's choice."""
    return get_origin(field.annotation) is dict


def leaves(model: type[BaseModel], prefix: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    """Every key path of ``model`` that holds a value, in the order of declaration."""
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is None:
            yield (*prefix, name), field
        else:
            yield from leaves(section, (*prefix, name))


def expected(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The type in a user's words: ``a whole number above 0 or 'auto'``."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return expected(
            inner, [*metadata, *(m for e in extra for m in (e.metadata if isinstance(e, FieldInfo) else [e]))]
        )
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not types.NoneType]
        words = [expected(part, metadata) for part in parts]
        return " or ".join([*words, "null"] if len(parts) < len(get_args(annotation)) else words)
    if get_origin(annotation) is Literal:
        return either([f"'{choice}'" if isinstance(choice, str) else str(choice) for choice in get_args(annotation)])
    if get_origin(annotation) is list:
        return f"a list of {_count(metadata)}{_plural(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "a mapping"
    return _NOUNS.get(annotation, "a value") + _bounds(metadata)


def found(value: Any) -> str:
    """The value as an error message names it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, _NUMBERS):
        return f"the number {_cut(str(value))}"
    if isinstance(value, str):
        return f"the text '{_cut(value)}'"
    return f"the {'mapping' if isinstance(value, dict) else 'list'} {_cut(str(value))}"  # pyright: ignore[reportUnknownArgumentType]  # any keys


def explain(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]
) -> Iterator[tuple[Path, Problem]]:
    """What ``error`` says about ``values``, in users' words: key path and problem (without a place), once per key."""
    seen: set[Path] = set()
    for detail in error.errors(include_url=False):
        path, field = _locate(model, detail["loc"])
        if path in seen and detail["type"] != "extra_forbidden":
            continue
        seen.add(path)
        cause = detail.get("ctx", {}).get("error")
        if cause is not None:
            yield path, Problem(str(cause))
        elif detail["type"] == "extra_forbidden":
            unknown = tuple(str(key) for key in detail["loc"])
            yield unknown, unknown_key(model, unknown)
        elif field is None or detail["type"] == "missing":
            yield path, Problem(word_detail(detail))
        else:
            value: Any = values
            for key in path:
                value = value[key]
            wanted = expected(field.annotation, field.metadata)
            yield path, Problem(f"expected {wanted}, found {found(value)}", hint=_remedy(field, value))


def word_detail(detail: ErrorDetails) -> str:
    """One fault that pydantic found, in users' words, without knowing the model."""
    kind, context = detail["type"], detail.get("ctx", {})
    if "error" in context:
        return str(context["error"])
    if kind == "extra_forbidden":
        return f"unknown key '{detail['loc'][-1]}'"
    if kind == "missing":
        return "is missing"
    wanted = _WANTED.get(kind)
    if wanted is None:
        return detail["msg"]
    return f"expected {wanted.format(**context)}, found {found(detail['input'])}"


def unknown_key(model: type[BaseModel], path: Path, *, root: type[BaseModel] | None = None) -> Problem:
    """The problem (without a place) of a ``path`` that ``model`` does not have, with what was probably meant.

    Keys of other sections are looked for below ``root``, which is ``model`` itself when not given.
    """
    key, *rest = path
    field = model.model_fields.get(key)
    if field is None:
        return Problem(f"unknown key '{key}'", hint=_meant(key, model, root or model))
    section = section_of(field)
    if section is None or not rest:
        return Problem(f"'{key}' holds a value and has no keys below it")
    return unknown_key(section, tuple(rest), root=root or model)


def _meant(key: str, section: type[BaseModel], root: type[BaseModel]) -> str:
    """What an unknown ``key`` of ``section`` was probably meant to be; sections elsewhere are named in full."""
    everywhere = [(".".join(path[:-1]), path[-1]) for path, _ in leaves(root)]
    if "." in key and any(key == f"{home}.{name}" for home, name in everywhere):
        return "write it nested: one level a line"
    near = nearest(key, section.model_fields, cutoff=0.75)
    if near is not None:
        return f"did you mean '{near}'?"
    homes = [f"'{home}'" for home, name in everywhere if name == key and home]
    if homes:
        return f"'{key}' belongs under {either(homes)}"
    last = nearest(key, {name for _, name in everywhere}, cutoff=0.75)
    if last is not None:
        meant = [f"'{'.'.join(path)}'" for path, _ in leaves(root) if path[-1] == last]
        return f"did you mean {either(meant)}?"
    return did_you_mean(key, section.model_fields)


def _locate(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[Path, FieldInfo | None]:
    """The key path and field that a pydantic location points into; union members and list indices are left out."""
    path: Path = ()
    field: FieldInfo | None = None
    section: type[BaseModel] | None = model
    for key in loc:
        if section is None or str(key) not in section.model_fields:
            break
        path, field = (*path, str(key)), section.model_fields[str(key)]
        section = section_of(field)
    return path, field


def _remedy(field: FieldInfo, value: Any) -> str:
    """A hint for the mistakes that YAML invites."""
    wanted = members(field.annotation)
    choices = [choice for member in wanted if get_origin(member) is Literal for choice in get_args(member)]
    if isinstance(value, str):
        near = nearest(value, [str(choice) for choice in choices])
        if near is not None:
            return f"did you mean '{near}'?"
        if bool in wanted and value.lower() in _BOOL_WORDS:
            return "write true or false"
        if any(number in wanted for number in _NUMBERS) and _is_number(value):
            return "write it without quotes"
    if isinstance(value, float) and int in wanted and float not in wanted and value.is_integer():
        return f"write {int(value)}"
    if isinstance(value, (*_NUMBERS, bool)) and str in wanted:
        return f"quotes make it text: '{_cut(str(value))}'"
    return ""


def members(annotation: Any) -> list[Any]:
    """The types that a union, or a lone annotation, allows."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [annotation]


def _bounds(metadata: Sequence[Any]) -> str:
    """Limits as words; a pattern comes last, where ``that`` continues the sentence."""
    words: list[str] = []
    pattern = ""
    for limit in metadata:
        match limit:
            case limits.Gt(gt=bound):
                words.append(f"above {bound}")
            case limits.Ge(ge=bound):
                words.append(f"of at least {bound}")
            case limits.Lt(lt=bound):
                words.append(f"below {bound}")
            case limits.Le(le=bound):
                words.append(f"of at most {bound}")
            case limits.MaxLen(max_length=length):
                words.append(f"of at most {length} characters")
            case _:
                text = getattr(limit, "pattern", None)
                pattern = f" that matches {text}" if text else pattern
    return (" " + " and ".join(words) if words else "") + pattern


def _count(metadata: Sequence[Any]) -> str:
    least = next((limit.min_length for limit in metadata if isinstance(limit, limits.MinLen)), None)
    most = next((limit.max_length for limit in metadata if isinstance(limit, limits.MaxLen)), None)
    if least is not None and least == most:
        return f"{least} "
    return "" if least is None else f"at least {least} "


def _plural(annotation: Any) -> str:
    inner = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(inner, "values")


def either(words: Sequence[str]) -> str:
    """``a, b or c``."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
