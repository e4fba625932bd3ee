"""Errors as the user sees them, and the exit code of each."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Sequence
from typing import TextIO

from ..core.errors import DltrainError, Interrupted, JobError, Problem, RunFailed

_RED, _DIM, _RESET = "\033[1;31m", "\033[2m", "\033[0m"


def render_error(error: DltrainError, stream: TextIO | None = None) -> None:
    """Write ``error`` to ``stream`` (standard error by default), in colour where a person watches."""
    out = sys.stderr if stream is None else stream
    lead = f"{_RED}dltrain:{_RESET} " if wants_colour(out) else "dltrain: "
    if not isinstance(error, JobError):
        out.write(f"{lead}{error}\n")
        if isinstance(error, RunFailed) and error.report:
            out.write(dim(f"report: {error.report}", out) + "\n")
        return
    count = len(error.problems)
    if count > 1:
        out.write(f"{lead}{count} problems; nothing was started\n")
    for problem in error.problems:
        hint = [dim(f"      {line}", out) for line in problem.hint.splitlines()]
        out.write("\n".join([("  " if count > 1 else lead) + _sentence(problem), *hint]) + "\n")


def exit_code(error: DltrainError) -> int:
    """2 for a wrong request, 128 + the signal's number after an interrupt, 1 for a failed run."""
    if isinstance(error, JobError):
        return 2
    return 128 + error.signum if isinstance(error, Interrupted) else 1


def wants_colour(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal whose user did not ask for plain text (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def dim(text: str, stream: TextIO) -> str:
    """``text`` in a fainter shade where a person watches ``stream``."""
    return f"{_DIM}{text}{_RESET}" if wants_colour(stream) else text


def _sentence(problem: Problem) -> str:
    first, *more = problem.what.splitlines() or [""]
    place = f"{problem.where}: " if problem.where else ""
    return "\n".join([f"{place}{first}", *(f"      {line}" for line in more)])


def columns(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """``rows`` as lines whose columns stand under each other; those numbered in ``right`` end where they end."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)


def data_size(count: float) -> str:
    """A number of bytes for people: ``"512 B"``, ``"1.5 kB"``, ``"23.4 GB"``."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} TB"


def parse_size(text: str, where: str) -> int:
    """Bytes of ``"5GB"``, ``"512 MiB"`` or ``"4096"``.

    Raises:
        JobError: that is no size; ``where`` says whose.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kKMGT]?)(i?)B?", text.strip())
    count = (
        0
        if match is None
        else int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    )
    if count < 1:
        raise JobError(Problem(f"'{text}' is no size", where, "write a number of bytes, or like 500MB, 5GB, 2GiB"))
    return count
