"""Errors a user can act on, and how they are worded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_SHOWN = 30


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a request: what, where (file and key), and what would be right."""

    what: str
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{place}{self.what}{hint}"


class DltrainError(Exception):
    """Base of every error that dltrain raises on purpose."""


class JobError(DltrainError):
    """The request is wrong; nothing was started. The CLI exits with 2."""

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))

    def __reduce__(self) -> tuple[type[JobError], tuple[Problem, ...]]:
        """Pickle with the problems, which nodes raise through Ray."""
        return type(self), self.problems


class RunFailed(DltrainError):
    """The request was right, the run failed. The CLI exits with 1.

    ``report`` is the path of the failure report, where one was written.
    """

    def __init__(self, message: str, *, report: str = "") -> None:
        super().__init__(message)
        self.report = report


class NonFiniteLoss(DltrainError):
    """A loss or gradient is infinite or undefined. Computing it again would give the same.

    Attributes:
        samples: what it was computed from, JSON-able: of each microbatch the rank, the loss, and the samples.
        witness: it is another rank's.
    """

    def __init__(self, what: str, *, samples: list[dict[str, Any]], witness: bool) -> None:
        super().__init__(what)
        self.samples, self.witness = samples, witness


class Interrupted(DltrainError):
    """The run was asked to stop by a signal; the CLI exits with 128 + the signal's number."""

    def __init__(self, message: str, *, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint that names the nearest of ``choices``, or lists them, or the first of many, when none is near."""
    known = sorted(choices)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(known[:_SHOWN])}{', …' if len(known) > _SHOWN else ''}" if known else ""
