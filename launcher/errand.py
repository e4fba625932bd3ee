"""A forked child that does one thing, says what came of it, and ends."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any

from ..core.wire import Channel
from .host import ForkServer
from .messages import ChildSpec, Exit


@dataclass(frozen=True)
class Outcome:
    """What came of an errand.

    Attributes:
        messages: what the child said.
        output: what it printed.
        exit: how it ended; None where it took too long and was killed.
    """

    messages: list[dict[str, Any]]
    output: str
    exit: Exit | None

    def __str__(self) -> str:
        """How it ended, in a few words."""
        if self.exit is None:
            return "took too long"
        if self.exit.signal is not None:
            return f"was killed by {signal.Signals(self.exit.signal).name}"
        return f"ended the process with exit code {self.exit.code}"


def send(server: ForkServer, spec: ChildSpec, timeout: float) -> Outcome:
    """Fork ``spec`` and wait for its end, ``timeout`` seconds at most. ``server`` must have answered hello.

    Raises:
        HostError: the fork server died.
    """
    ours, theirs = socket.socketpair()
    output = os.memfd_create("dltrain-errand-output")
    channel = Channel(ours)
    messages: list[dict[str, Any]] = []
    ended: Exit | None = None
    try:
        child = server.fork(spec, {"stdout": output, "stderr": output, "channel": theirs.fileno()})
        theirs.close()
        deadline = time.monotonic() + timeout
        while ended is None and time.monotonic() < deadline:
            exits = [event.exit for event in server.events(0.05) if event.id == child and event.exit is not None]
            messages += channel.receive()
            ended = exits[0] if exits else None
        if ended is None:
            server.signal(child, signal.SIGKILL)
        text = os.pread(output, 1 << 16, 0).decode(errors="replace").strip()
        return Outcome(messages, text, ended)
    finally:
        channel.close()
        os.close(output)
