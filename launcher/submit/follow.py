"""A growing file, read until somebody says that no more will come."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from ...core.errors import RunFailed

T = TypeVar("T")

PATIENCE = 600.0
"""Seconds for which somebody who watches a job bears that nobody answers: controllers are restarted, links break."""

_CHUNK = 1 << 16
_POLL = 0.3
_ASK = 2.0  # seconds between two questions of whether it is over: they go to a server that others share


class Patient(Generic[T]):
    """A question, whose last answer stands for a while when nobody answers.

    Args:
        last: the answer before the first one.
    """

    def __init__(self, question: Callable[[], T], last: T) -> None:
        self._question, self._last = question, last
        self._silent: float | None = None  # since when nobody has answered

    def __call__(self) -> T:
        """Raises RunFailed, as the question does, when there was no answer for ``PATIENCE`` seconds."""
        try:
            self._last = self._question()
        except RunFailed:
            now = time.monotonic()
            self._silent = now if self._silent is None else self._silent
            if now - self._silent > PATIENCE:
                raise
        else:
            self._silent = None
        return self._last

    def heard(self) -> None:
        """Begin anew to be patient: there was an answer of another kind."""
        self._silent = None


def lines_of(path: Path, *, until: Callable[[], bool] | None = None) -> Iterator[bytes]:
    """The bytes of the file as they come.

    Args:
        path: it need not be there yet.
        until: says that no more will come; None reads what is there now.

    Raises:
        RunFailed: ``until`` has raised it for ``PATIENCE`` seconds.
    """
    offset = 0
    over = until is None
    asked = time.monotonic()
    ask = None if until is None else Patient(until, False)
    while True:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK):
                offset += len(chunk)
                yield chunk
        if over:
            return
        if ask is not None and time.monotonic() - asked > _ASK:
            over = ask()  # what was written before that is read once more
            asked = time.monotonic()
        else:
            time.sleep(_POLL)
