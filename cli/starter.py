"""Example files that commands write for their users to edit."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import JobError, Problem
from ..core.storage import Storage


def write_starter(path: Path, text: str, *, name: str, force: bool) -> None:
    """Write ``text`` to ``path``; an existing file is replaced only with ``force``; ``name`` is its usual name.

    Raises:
        JobError: the file exists, or it cannot be written.
    """
    if path.is_dir():
        raise JobError(Problem("this is a folder", str(path), f"name a file: {path / name}"))
    if path.exists() and not force:
        raise JobError(Problem("this file exists", str(path), "--force replaces it"))
    if not path.parent.is_dir():
        raise JobError(Problem(f"the folder {path.parent} does not exist", str(path)))
    try:
        Storage(str(path.parent)).write(path.name, [text.encode()])
    except OSError as error:
        raise JobError(Problem(f"cannot be written: {error.strerror}", str(path))) from error
