"""A growing file, read until somebody says that no more will come."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_CHUNK = 1 << 16
_POLL = 0.3
_ASK = 2.0  # seconds between two questions of whether it is over: they go to a server that others share


def lines_of(path: Path, *, until: Callable[[], bool] | None = None) -> Iterator[bytes]:
    """The bytes of the file as they come.

    Args:
        path: it need not be there yet.
        until: says that no more will come; None reads what is there now.
    """
    offset = 0
    over = until is None
    asked = time.monotonic()
    while True:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK):
                offset += len(chunk)
                yield chunk
        if over:
            return
        if until is not None and time.monotonic() - asked > _ASK:
            over = until()  # what was written before that is read once more
            asked = time.monotonic()
        else:
            time.sleep(_POLL)
