"""What a node agent has to tell the controller, until it is asked."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from .host import HostError
from .messages import RankEvent

_MAX_QUEUED = 4 << 20


class News:
    """Events on their way. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._events: list[RankEvent] = []
        self._text_size = 0
        self._broken = ""
        self._ready = threading.Condition()

    def tell(self, found: Sequence[RankEvent]) -> None:
        """Have the controller told of ``found``."""
        with self._ready:
            self._events.extend(found)
            self._text_size += sum(len(event.text) for event in found)
            self._ready.notify_all()

    def end(self, why: str) -> None:
        """Have it told that there will be no more."""
        with self._ready:
            self._broken = why
            self._ready.notify_all()

    @property
    def full(self) -> bool:
        """Whether so much output waits that more had better stay in its files."""
        return self._text_size >= _MAX_QUEUED

    def take(self, timeout: float) -> list[RankEvent]:
        """What there is, waiting at most ``timeout`` seconds for something.

        Raises:
            HostError: there will be no more; the text says why.
        """
        with self._ready:
            if not self._events and not self._broken:
                self._ready.wait(timeout)
            if self._broken and not self._events:
                raise HostError(self._broken)
            events, self._events, self._text_size = self._events, [], 0
        return events
