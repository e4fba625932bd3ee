"""From what a user names to a checkpoint: a run directory, a folder or URL of checkpoints, or one. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import JobError, Problem, did_you_mean
from ..core.formats import is_url
from ..core.storage import Storage
from .manifest import CorruptCheckpoint, Manifest, folder_name, folder_step
from .reader import catalogue, open_manifest

_HINT = "name a run directory, a folder or URL with step-* folders, or one of these"
_SHOWN = 8


@dataclass(frozen=True)
class Place:
    """Where checkpoints are.

    Attributes:
        storage: the folder that holds the ``step-*`` folders.
        named: the step whose folder was named; None where all were.
        run: the run directory that they belong to, where that is known.
        source: what the user named.
    """

    storage: Storage
    named: int | None
    run: Path | None
    source: str


def locate(source: str, options: Mapping[str, Any] | None = None) -> Place:
    """Find the folder of checkpoints that ``source`` means; a run's job tells where its own are.

    Args:
        options: storage options of the fsspec filesystem, for a URL; beside those of a run's own job.

    Raises:
        JobError: there is nothing of that name, or it cannot be read.
    """
    if is_url(source):
        return _remote(source, options)
    path = Path(source).expanduser().absolute()
    if not path.is_dir():
        raise JobError(_missing(path, source))
    if (path / "run.json").is_file():
        return _of_run(path, source, options)
    step = folder_step(path.name)
    folder = path if step is None else path.parent
    run = folder.parent if folder.name == "checkpoints" and (folder.parent / "run.json").is_file() else None
    return Place(Storage(str(folder), where=source), step, run, source)


def choose(place: Place, step: int | None = None) -> int:
    """The step of the checkpoint that is meant: ``step``, or the one whose folder was named, or the newest.

    Raises:
        JobError: there is no such complete checkpoint.
    """
    if place.named is not None and step not in (None, place.named):
        raise JobError(Problem(f"the folder is that of step {place.named}, not of {step}", place.source))
    wanted = place.named if step is None else step
    steps = steps_of(place)
    if wanted is None and steps:
        return steps[0]
    if wanted in steps:
        return wanted
    with reading(place.source):
        there = place.storage.folders()
    if wanted is not None and folder_name(wanted) in there:
        what, hint = f"{folder_name(wanted)} has no manifest: it was never completed, or was set aside", ""
    elif wanted is not None and steps:
        what, hint = f"there is no step {wanted} in {place.storage}", _nearest(wanted, steps)
    else:
        what, hint = f"there is no complete checkpoint in {place.storage}", _empty_hint(place.storage, there)
    raise JobError(Problem(what, place.source, hint or _others(steps)))


def steps_of(place: Place) -> list[int]:
    """Steps of the complete checkpoints, newest first.

    Raises:
        JobError: the folder cannot be read.
    """
    with reading(place.source):
        return [entry.step for entry in catalogue(place.storage)]


def open_chosen(place: Place, step: int | None = None) -> Manifest:
    """The manifest of the checkpoint that :func:`choose` finds.

    Raises:
        JobError: there is none, or it is not valid, or of a newer format.
    """
    chosen = choose(place, step)
    with reading(place.source):
        return open_manifest(place.storage, chosen)


@contextlib.contextmanager
def reading(source: str) -> Generator[None]:
    """Have a storage that fails, and a checkpoint that is damaged, end in a refusal of what was asked.

    Raises:
        JobError: in their place.
    """
    try:
        yield
    except CorruptCheckpoint as error:
        hint = "'dltrain checkpoint verify' lists all that is wrong; '--step' takes another"
        raise JobError(Problem(str(error), source, hint)) from error
    except OSError as error:
        raise JobError(Problem(f"cannot be read: {error.strerror or error}", source)) from error


def _remote(source: str, options: Mapping[str, Any] | None) -> Place:
    parent, _, name = source.rstrip("/").rpartition("/")
    step = folder_step(name)
    storage = Storage(source if step is None else parent, options, where=source)
    if step is None:
        with reading(source):
            folders = storage.folders()
        if "checkpoints" in folders and not any(folder_step(name) is not None for name in folders):
            storage = Storage(f"{source.rstrip('/')}/checkpoints", options, where=source)
    return Place(storage, step, None, source)


def _of_run(path: Path, source: str, given: Mapping[str, Any] | None) -> Place:
    """A run directory's checkpoints: where its job put them."""
    try:
        job = json.loads((path / "run.json").read_text(encoding="utf-8"))["job"]
        spec = job["checkpoint"] if job else None
        to, options = (spec["to"], spec["options"]) if spec else (None, {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(Problem(f"run.json cannot be read: {error}", source, "name its folder of checkpoints")) from None
    if spec is None:
        raise JobError(Problem("this is a script's run: what it saved is its own affair", source))
    url = to or str(path / "checkpoints")
    merged = {**options, **(given or {})} if is_url(url) else None
    return Place(Storage(url, merged, where=source), None, path, source)


def _missing(path: Path, source: str) -> Problem:
    if path.is_file():
        return Problem("this is a file, not a checkpoint", source, _HINT)
    folder = path.parent
    if not folder.is_dir():
        return Problem("there is no such folder", source, f"{folder} does not exist")
    step = folder_step(path.name)
    there = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    found = [other for name in there if (other := folder_step(name)) is not None]
    if step is not None and found:
        return Problem(f"there is no step {step} in {folder}", source, _nearest(step, found))
    return Problem("there is no such folder", source, did_you_mean(path.name, there) or _HINT)


def _nearest(step: int, steps: list[int]) -> str:
    return f"did you mean {min(steps, key=lambda other: (abs(other - step), other))}? {_others(steps)}"


def _others(steps: list[int]) -> str:
    ordered = sorted(steps, reverse=True)
    more = ", …" if len(steps) > _SHOWN else ""
    return f"complete: {', '.join(map(str, ordered[:_SHOWN]))}{more}" if steps else ""


def _empty_hint(storage: Storage, there: list[str]) -> str:
    """What to say of a folder without a complete checkpoint."""
    half = [name for name in there if folder_step(name) is not None]
    if half:
        return f"not complete: {', '.join(half[-_SHOWN:])}"
    runs = [name for name in there if name.isdecimal() or name == "latest"]
    return f"did you mean {storage}/{'latest' if 'latest' in runs else runs[-1]}?" if runs else _HINT
