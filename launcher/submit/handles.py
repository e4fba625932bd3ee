"""Handles of submitted jobs: small files beside the runs, found again by the words that name runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ...core.errors import JobError, Problem
from ..rundir import Record
from ..runs import find_run
from .handle import Handle


def write_handle(runs: Path, handle: Handle) -> Path:
    """Write ``<runs>/<name>/<kind>-<id>.json``: temporary name, sync, rename."""
    home = runs / handle.name
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"{handle.key}.json"
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(handle), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return path


def read_handle(path: Path) -> Handle | None:
    """The handle in a file; None where it is none."""
    try:
        return Handle(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def all_handles(runs: Path) -> Iterator[Handle]:
    """Every handle in a runs folder."""
    for path in sorted(runs.absolute().glob("*/*-*.json")):
        if (handle := read_handle(path)) is not None:
            yield handle


def find_handle(runs: Path, word: str | None) -> Handle | None:
    """The handle that ``word`` names: ``<name>/<kind>-<id>``, or the path of its file; None where it names none.

    A job's name means its newest submission, and None the newest of all, where no run has been launched since other
    than by that very submission.

    Raises:
        JobError: the file is no handle.
    """
    handles = list(all_handles(runs))
    if word is not None:
        if word.endswith(".json"):
            return _at(Path(word))
        exact = [handle for handle in handles if f"{handle.name}/{handle.key}" == word]
        if exact:
            return exact[0]
    same = [handle for handle in handles if word in (None, handle.name)]
    newest = max(same, key=lambda handle: handle.submitted, default=None)
    if newest is None or any(_later(run, newest) for run in _runs(runs, word)):
        return None
    return newest


def resolve(runs: Path, word: str | None) -> tuple[Path | None, Handle | None]:
    """What a word means: a run directory, the submitted job that drives it, or both.

    Raises:
        JobError: neither.
    """
    handle = find_handle(runs, word)
    if handle is not None:
        return run_of(runs, handle), handle
    run = find_run(runs, word)
    key = _submission(run)
    return run, read_handle(run.parent / f"{key}.json") if key else None


def _at(path: Path) -> Handle | None:
    handle = read_handle(path)
    if handle is None:
        raise JobError(Problem("this is no handle of a submitted job", str(path)))
    return handle


def run_of(runs: Path, handle: Handle) -> Path | None:
    """The run directory that a submitted job has made or gone on with, where it can be seen from here."""
    made = [run for run in _runs(runs, handle.name) if _submission(run) == handle.key]
    return max(made, key=lambda run: int(run.name), default=None)


def _runs(runs: Path, name: str | None) -> Iterator[Path]:
    for record in runs.absolute().glob(f"{name or '*'}/*/run.json"):
        if record.parent.name.isdecimal():
            yield record.parent


def _submission(run: Path) -> str:
    record = Record.read(run)
    return record.submission if record else ""


def _later(run: Path, handle: Handle) -> bool:
    """Whether somebody else has launched the run after the handle's job was submitted."""
    record = Record.read(run)
    if record is None or (record.name, record.submission) == (handle.name, handle.key):
        return False
    return (record.driver.since if record.driver else record.started) > handle.submitted
