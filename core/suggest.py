"""Hints that name what the user probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

JOB_SUFFIXES = (".yaml", ".yml", ".json")
"""Endings of job files."""

_SHOWN = 8


def nearest(word: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The choice most like ``word``, without regard to case, ``-`` and ``_``; None when none is near."""
    plain = {_plain(choice): choice for choice in sorted(choices, reverse=True)}
    near = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=cutoff)
    return plain[near[0]] if near else None


def similar_files(path: Path, suffixes: Sequence[str]) -> str:
    """A hint that names files with one of ``suffixes`` near the missing ``path``; empty when there is none.

    The file most like it is named alone; failing that, all of its folder, or the folder that does not exist.
    """
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in suffixes and entry.is_file())
    except OSError:
        return ""
    stems = {Path(name).stem: name for name in names}
    near = nearest(path.name, names) or stems.get(nearest(path.stem, stems) or "")
    if near is not None:
        return f"did you mean '{folder / near}'?"
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    return f"there are: {shown}" if shown else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
