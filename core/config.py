"""From a job file, the environment and the command line to one checked ``Job``, with the origin of every value.

Precedence: command line > environment (``DLTRAIN_TRAIN__EPOCHS=3``) > file > defaults. Mappings are merged key by key,
everything else is replaced. Every problem is collected, and all are raised together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from .checks import check_job, check_references
from .document import parse_value, read_document
from .errors import JobError, Problem
from .job import Job
from .schema import Path as Key
from .schema import explain, found, is_free, leaves, section_of, unknown_key
from .suggest import nearest

ENV_PREFIX = "DLTRAIN_"
COMMAND_LINE = "command line"
DEFAULT = "default"
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class ResolvedJob:
    """A job and where it came from.

    Attributes:
        job: the checked job.
        origins: for every value's dotted key, ``"dltrain.yaml:12"``, ``"DLTRAIN_TRAIN__EPOCHS"``, ``"command line"`` or
            ``"default"``; in the order of the schema.
        path: the job file, None without one.
    """

    job: Job
    origins: Mapping[str, str]
    path: Path | None


def load_job(
    path: Path | None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    recipes: Collection[str] = (),
    whole: bool = True,
) -> ResolvedJob:
    """Resolve and check a job without importing torch or any of the user's code.

    Args:
        path: the job file; None starts from the defaults.
        overrides: ``key.path=value``, the value in YAML (``train.lr=1e-3``, ``model.widths=[8, 16]``).
        flags: dotted key to value, from options such as ``--nodes``; they stand beside the overrides.
        environ: the environment; every variable with the prefix ``DLTRAIN_`` must name a key.
        recipes: names of the built-in recipes; empty leaves the name of a recipe without ``:`` unchecked.
        whole: also check the values against each other and the files; a script's launch, which uses only some
            sections, does not.

    Raises:
        JobError: with every problem found, each with its place and, where one is known, a hint.
    """
    layers = _Layers()
    if path is not None:
        layers.add_file(path)
    layers.add_environment(environ or {})
    layers.add_overrides(overrides)
    layers.add_flags(flags or {})
    job, faults = validate_values(layers.nested())
    problems = [*layers.problems, *(_placed(problem, layers.place(key)) for key, problem in faults)]
    if whole:
        check = check_references if faults else check_job  # a value left out would make sums wrong
        problems += check(job, layers.place_of, recipes=recipes)
    if problems:
        raise JobError(*problems)
    return ResolvedJob(job, layers.origins(job), path)


def validate_values(nested: dict[str, Any]) -> tuple[Job, list[tuple[Key, Problem]]]:
    """The job of ``nested``, from which the values that are wrong are removed, and the problem of each of those.

    Raises:
        JobError: nothing can be left out that would make it right.
    """
    faults: list[tuple[Key, Problem]] = []
    while True:
        try:
            return Job.model_validate(nested), faults
        except ValidationError as error:
            found_now = list(explain(error, Job, nested))
        if any(not key or key in dict(faults) for key, _ in found_now):  # nothing to leave out
            raise JobError(*(_placed(problem, ".".join(key)) for key, problem in [*faults, *found_now]))
        faults += found_now
        for key, _ in found_now:
            _remove(nested, key)


def _remove(nested: dict[str, Any], key: Key) -> None:
    for part in key[:-1]:
        nested = nested.get(part, {})
    nested.pop(key[-1], None)


@dataclass
class _Layers:
    """Values by key path, each layer over the one before; unknown keys are noted as problems and left out."""

    values: dict[Key, tuple[Any, str]] = field(default_factory=dict[Key, tuple[Any, str]])
    problems: list[Problem] = field(default_factory=list[Problem])

    def add_file(self, path: Path) -> None:
        document = read_document(path)
        if document.value is None:
            return
        if not isinstance(document.value, dict):
            self.problems.append(
                Problem(f"expected keys like 'name: digits', found {found(document.value)}", str(path))
            )
            return

        def origin(key: Key) -> str:
            return f"{path}:{document.lines[key]}"

        self._add((), cast("dict[str, Any]", document.value), origin)

    def add_environment(self, environ: Mapping[str, str]) -> None:
        known = ["__".join(key) for key, _ in leaves(Job)]
        for name in sorted(environ):
            if not name.startswith(ENV_PREFIX):
                continue
            key = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
            if not _is_known(key):
                near = nearest("__".join(key), known)
                hint = f"did you mean {ENV_PREFIX}{near.upper()}?" if near else f"{ENV_PREFIX}… are keys of the job"
                self.problems.append(Problem("names no key of a job", name, hint))
                continue
            self._add_text(key, environ[name], name)

    def add_overrides(self, overrides: Sequence[str]) -> None:
        for override in overrides:
            name, equals, text = override.partition("=")
            if not equals or not _KEY.fullmatch(name):
                self.problems.append(Problem(f"'{override}' is no override", COMMAND_LINE, "write key.path=value"))
                continue
            key = tuple(name.split("."))
            if _is_known(key):
                self._add_text(key, text, COMMAND_LINE)
            else:
                self.problems.append(_placed(unknown_key(Job, key), f"{COMMAND_LINE}: {name}"))

    def add_flags(self, flags: Mapping[str, Any]) -> None:
        for name, value in flags.items():
            key = tuple(name.split("."))
            before = self.values.get(key)
            if before is not None and before[1] == COMMAND_LINE and before[0] != value:
                what = f"given twice: {found(before[0])} as {name}=…, {found(value)} as an option"
                self.problems.append(Problem(what, f"{COMMAND_LINE}: {name}"))
            self.values[key] = (value, COMMAND_LINE)

    def nested(self) -> dict[str, Any]:
        """The values as the nested mappings that the models take."""
        root: dict[str, Any] = {}
        for key, (value, _) in self.values.items():
            below = root
            for part in key[:-1]:
                below = below.setdefault(part, {})
            below[key[-1]] = value
        return root

    def origins(self, job: Job) -> dict[str, str]:
        result: dict[str, str] = {}
        for key, _ in job_values(job):
            set_here = self.values.get(key)
            result[".".join(key)] = set_here[1] if set_here else DEFAULT
        return result

    def place_of(self, dotted: str) -> str:
        """Where the value of a dotted key (or the first value below it) was set, and the key."""
        return self.place(tuple(dotted.split(".")))

    def place(self, key: Key) -> str:
        origin = next((o for k, (_, o) in self.values.items() if k[: len(key)] == key or key[: len(k)] == k), None)
        return ": ".join(part for part in (origin, ".".join(key)) if part)

    def _add_text(self, key: Key, text: str, origin: str) -> None:
        try:
            value = parse_value(text)
        except JobError as error:
            self.problems += [_placed(problem, f"{origin}: {'.'.join(key)}") for problem in error.problems]
            return
        for part in reversed(key):
            value = {part: value}
        self._add((), value, lambda _: origin)

    def _add(self, prefix: Key, mapping: Mapping[str, Any], origin: Callable[[Key], str]) -> None:
        """Lay the nested ``mapping`` of the section at ``prefix`` over what is there."""
        model = _section(prefix)
        for name, value in mapping.items():
            key = (*prefix, name)
            spec = model.model_fields.get(name)
            if spec is None:
                problem = unknown_key(model, (name,), root=Job)
                self.problems.append(_placed(problem, f"{origin(key)}: {'.'.join(key)}"))
            elif value is None and (is_free(spec) or section_of(spec) is not None):
                continue  # what is left of a section whose keys are all commented out
            elif section_of(spec) is None:
                self._set(key, value, origin)
            elif isinstance(value, dict):
                self._add(key, cast("dict[str, Any]", value), origin)
            else:
                what = f"expected the keys of a section, found {found(value)}"
                self.problems.append(Problem(what, f"{origin(key)}: {'.'.join(key)}"))

    def _set(self, key: Key, value: Any, origin: Callable[[Key], str]) -> None:
        """Put ``value`` at ``key``, over what is there; mappings are merged, an empty one replaces."""
        if isinstance(value, dict) and value:
            for name, below in cast("dict[str, Any]", value).items():
                self._set((*key, name), below, origin)
            return
        for other in [k for k in self.values if k[: len(key)] == key or key[: len(k)] == k]:
            del self.values[other]
        self.values[key] = (value, origin(key))


def job_values(job: BaseModel, prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every value of ``job`` by key path, in the order of the schema; free mappings are entered."""
    for name, spec in type(job).model_fields.items():
        value = getattr(job, name)
        if section_of(spec) is not None:
            yield from job_values(value, (*prefix, name))
        else:
            yield from _entries((*prefix, name), value)


def _entries(key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, dict) and value:
        for name, below in cast("dict[str, Any]", value).items():
            yield from _entries((*key, name), below)
    else:
        yield key, value


def _section(key: Key) -> type[BaseModel]:
    model: type[BaseModel] = Job
    for name in key:
        below = section_of(model.model_fields[name])
        assert below is not None, key
        model = below
    return model


def _is_known(key: Key) -> bool:
    """Whether ``key`` names a section or a value, or lies below a free mapping."""
    model: type[BaseModel] | None = Job
    for name in key:
        spec = model.model_fields.get(name) if model is not None else None
        if spec is None:
            return False
        if is_free(spec):
            return True
        model = section_of(spec)
    return True


def _placed(problem: Problem, where: str) -> Problem:
    return Problem(problem.what, where, problem.hint)
