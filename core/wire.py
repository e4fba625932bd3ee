"""The socket between a rank and its agent: JSON lines that never block the sender.

A rank must not wait for whoever reads its metrics. What does not fit the socket's buffer stays in order in this
process and goes out with the next message.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections import deque
from typing import Any

Message = dict[str, Any]


class Channel:
    """One end of a stream socket that carries JSON objects, one a line, both ways. Not thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._out: deque[bytes] = deque()
        self._in = bytearray()
        self.closed = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message) -> None:
        """Queue ``message`` and write what the socket takes now. A closed peer is noted in ``closed``, not raised."""
        if not self.closed:
            self._out.append(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            self._push()

    def flush(self, timeout: float) -> bool:
        """Wait until everything queued is written, at most ``timeout`` seconds; whether it was."""
        deadline = time.monotonic() + timeout
        while self._out and not self.closed:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([], [self._sock], [], left)[1]:
                return False
            self._push()
        return not self._out

    def receive(self) -> list[Message]:
        """The whole messages that have arrived, without waiting. After the peer closed, ``closed`` is true."""
        while not self.closed:
            try:
                chunk = self._sock.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            if not chunk:
                self.closed = True
            self._in += chunk
        *lines, rest = bytes(self._in).split(b"\n")
        self._in = bytearray(rest)
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        """Send no more; what the peer still says can be received, until it has closed its end."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.closed = True
        self._sock.close()

    def _push(self) -> None:
        while self._out:
            line = self._out[0]
            try:
                sent = self._sock.send(line, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                self.closed = True
                self._out.clear()
                return
            if sent < len(line):
                self._out[0] = line[sent:]
                return
            self._out.popleft()
