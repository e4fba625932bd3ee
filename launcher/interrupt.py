"""Ctrl-C, SIGTERM and a closed terminal as requests that the controller's loop can look at."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Generator
from types import FrameType, TracebackType
from typing import Any

from ..core.errors import Interrupted
from ..core.streams import lead_nowhere

_ONE_REQUEST = 0.3  # seconds; a parent such as `make` or `uv run` passes on what the terminal has sent already


class StopRequests:
    """Counts SIGINT, SIGTERM and SIGHUP while it is entered, instead of letting them end the process.

    ``count`` is how many requests came, ``signum`` the first. A SIGHUP that was ignored before (nohup) stays ignored,
    and adds nothing to an earlier request: shells send it along when they end. Outside the main thread, where Python
    allows no handlers, the count stays at zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self.signum = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: it was not set from Python

    def leave_if_asked(self) -> None:
        """Give up what has not begun.

        Raises:
            Interrupted: a stop was asked for.
        """
        if self.count:
            raise Interrupted("stopped before training began", signum=self.signum)

    @contextlib.contextmanager
    def kept(self) -> Generator[None]:
        """Keep counting while Ray starts: it sets a handler of SIGTERM of its own, which raises SystemExit."""
        try:
            yield
        except SystemExit:
            self._request(signal.SIGTERM, None)
        finally:
            for signum in self._before:
                signal.signal(signum, self._request)

    def _request(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            self._let_go_of_terminals()
        now = time.monotonic()
        if self.count and (signum == signal.SIGHUP or now - self._at < _ONE_REQUEST):
            return
        self._at = now
        self.count += 1
        self.signum = self.signum or signum

    def _let_go_of_terminals(self) -> None:
        """The terminal is gone, and writing to it an error: from now on our words go nowhere."""
        while self._terminals:
            lead_nowhere(self._terminals.pop())
