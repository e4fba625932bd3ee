"""The rank's side of its persister: the process that writes its snapshots (``checkpoint/persister.py``)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..checkpoint import persister

_SEND, _REAP = 5.0, 2.0
_MAX_MESSAGE = 1 << 16


class PersisterLost(Exception):  # no error of this process: it is started again
    """The persister has ended."""


class Persister:
    """A process beside this rank, started as a fork while this process has one thread, else as a new interpreter.

    Args:
        agent: a socket to the node's agent that it tells of what it saved; None where there is no agent.
    """

    def __init__(self, agent: socket.socket | None = None) -> None:
        self._agent = agent
        self._setup: dict[str, Any] = {}
        self._start()

    def fileno(self) -> int:
        return self._sock.fileno()

    def open(self, **setup: Any) -> None:
        """Say where to write, and as whom: the keys of the message that ``checkpoint/persister.py`` takes."""
        self._setup = {"t": "open", **setup}
        with contextlib.suppress(PersisterLost):  # as receive() will say
            self._send(self._setup)

    def close(self) -> None:
        """Let go of it: it finishes what it was given, and ends."""
        self._sock.close()

    def restart(self) -> None:
        """Start another one in the place of one that was lost."""
        self.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._reap()
        self._start()
        self.open(**{name: value for name, value in self._setup.items() if name != "t"})

    def save(self, step: int, image: int, text: bytes) -> None:
        """Hand over a snapshot: the descriptor of its memory, and its description.

        Raises:
            PersisterLost: it is gone.
        """
        described = os.memfd_create("dltrain-plan")
        try:
            with os.fdopen(os.dup(described), "wb") as file:
                file.write(text)
            self._send({"t": "save", "step": step}, [image, described])
        finally:
            os.close(described)

    def drop(self, step: int) -> None:
        """Have it give up the snapshot of ``step``, if it has that still. It answers when it has.

        Raises:
            PersisterLost: it is gone.
        """
        self._send({"t": "drop", "step": step})

    def receive(self) -> list[dict[str, Any]]:
        """What it has said since the last call, without waiting.

        Raises:
            PersisterLost: it is gone.
        """
        found: list[dict[str, Any]] = []
        while True:
            try:
                data = self._sock.recv(_MAX_MESSAGE)
            except BlockingIOError:
                return found
            except OSError:
                data = b""
            if not data:
                if found:
                    return found
                raise PersisterLost
            found.append(json.loads(data))

    def wait(self, seconds: float) -> None:
        """Wait until it has said something, or is gone."""
        _ready(self._sock, select.POLLIN, seconds)

    def _reap(self) -> None:
        """See the killed process off. One that the kernel still holds, as for a disk, comes to nothing any more."""
        deadline = time.monotonic() + _REAP
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(self.pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.005)

    def _send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        data = json.dumps(message).encode()
        try:
            if not _ready(self._sock, select.POLLOUT, _SEND):
                raise PersisterLost  # stopped, or stuck: its main thread does nothing but hear
            socket.send_fds(self._sock, [data], fds or [], socket.MSG_NOSIGNAL)
        except OSError:
            raise PersisterLost from None

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            self._sock = ours
            if sum(1 for _ in Path("/proc/self/task").iterdir()) == 1:
                self.pid = os.fork()
                if self.pid == 0:
                    persister.become(theirs, self._agent)
            else:
                self.pid = self._spawn(theirs)

    def _spawn(self, theirs: socket.socket) -> int:
        sockets = {"rank": theirs.fileno(), **({"agent": self._agent.fileno()} if self._agent else {})}
        words = [f"{name}={fd}" for name, fd in sockets.items()]
        command = [sys.executable, "-P", "-m", "dltrain.checkpoint.persister", *words]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=tuple(sockets.values()))
        child.returncode = 0  # Popen would wait for it: restart() does that
        return child.pid


def _ready(sock: socket.socket, event: int, seconds: float) -> bool:
    """Whether ``sock`` can be read or written within ``seconds``; select(2) would take no descriptor above 1023."""
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(1000 * seconds))
