"""The client's side of a fork server: find it or start it, ask it for children, hear how they end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.errors import DltrainError
from .forkserver import PRELOAD, TAKEN, peer_uid
from .messages import ChildSpec, Exit

_FIRST_CLIENT_TIMEOUT = 60.0
_REQUEST_TIMEOUT = 10.0

#: Variables that torch, its thread pools and the interpreter read once, when they start or are imported.
_READ_AT_START = ("TORCH", "PYTORCH", "PYTHON", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "GOMP_", "LD_", "MALLOC_", "ATEN_")


class HostError(DltrainError):
    """A fork server could not be started or reached."""


@dataclass(frozen=True)
class ChildEvent:
    """A child that was forked (``pid``) or that ended (``exit``)."""

    id: int
    pid: int = 0
    exit: Exit | None = None
    what: str = ""


def server_environment(environ: dict[str, str]) -> dict[str, str]:
    """The environment to start a fork server in: the ranks' own, with every thread pool kept from starting."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**environ, **single}


def last_edit(package: Path) -> int:
    """When the newest module of a package's folders was written, in nanoseconds."""
    return max(path.stat().st_mtime_ns for path in package.glob("*/*.py"))


def server_name(scope: str, environ: dict[str, str], preload: Sequence[str] = PRELOAD) -> str:
    """Name of the fork server that serves ``scope`` (a launch, or a Ray node) with this interpreter and environment.

    Two launches share a server only where a fresh process would have seen the same version of everything, so what is
    read once at start is part of the name.
    """
    start = sorted(f"{k}={v}" for k, v in environ.items() if k.startswith(_READ_AT_START) and k != "OMP_NUM_THREADS")
    edited = last_edit(Path(__file__).parent.parent)  # a warm server has the code that it has imported
    facts = "\n".join(
        [scope, str(os.getuid()), __version__, str(edited), sys.executable, sys.version, *preload, *start]
    )
    return f"dltrain-{os.getuid()}-{hashlib.sha256(facts.encode()).hexdigest()[:24]}"


class ForkServer:
    """A lease on a fork server. When it is closed, or this process dies, the server kills the children it asked for.

    Requests may come from any thread; events are for one thread.
    """

    def __init__(self, sock: socket.socket, log: int) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._log = log
        self._next = 0

    @classmethod
    def start(cls, name: str, environ: dict[str, str], timeout: float, preload: Sequence[str] = PRELOAD) -> ForkServer:
        """Connect to the fork server ``name``, starting it if there is none. Does not wait for its imports.

        Args:
            name: as :func:`server_name` makes it of the same environment and modules.
            environ: what its children's environment is.
            timeout: seconds that it may take to come up.
            preload: modules that it imports.

        Raises:
            HostError: it did not come up within ``timeout`` seconds, or another user holds the name.
        """
        deadline = time.monotonic() + timeout
        log = os.memfd_create("dltrain-forkserver-log")
        starter: subprocess.Popen[bytes] | None = None
        while True:
            started = starter is not None and starter.poll() is not None  # so a server listens, or has ended since
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                sock.connect("\0" + name)
            except (ConnectionRefusedError, FileNotFoundError):
                sock.close()
            else:
                if peer_uid(sock) != os.getuid():
                    sock.close()
                    raise HostError(f"the fork server's name {name} is held by another user on {socket.gethostname()}")
                if starter is not None:
                    starter.wait(max(1.0, deadline - time.monotonic()))  # it leaves the server behind and ends
                return cls(sock, log)
            died = False
            if starter is not None and started and starter.returncode != TAKEN:
                died = starter.returncode != 0 or _said(log)
            if died or time.monotonic() > deadline:
                what = "died as it started" if died else f"did not start within {timeout:g} s"
                raise HostError(f"the fork server {what}:\n{_tail(log)}")
            if starter is None or started:  # the first, or where that has found one which ended before it was asked
                command = [sys.executable, "-P", "-m", "dltrain.launcher.forkserver", name, str(_FIRST_CLIENT_TIMEOUT)]
                starter = subprocess.Popen(
                    [*command, *preload],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env=server_environment(environ),
                    start_new_session=True,  # a Ctrl-C at the terminal is the launcher's to act on
                )
            time.sleep(0.01)

    def fileno(self) -> int:
        return self._sock.fileno()

    def hello(self, *, keep_warm: float, timeout: float) -> dict[str, Any]:
        """Wait until the server has imported torch; what it says of itself.

        Raises:
            HostError: it did not answer within ``timeout`` seconds or died (with what it printed).
        """
        self._request({"op": "hello", "keep_warm": keep_warm})
        if not select.select([self._sock], [], [], timeout)[0]:
            raise HostError(f"the fork server did not finish importing torch within {timeout:g} s")
        return json.loads(self._receive())

    def guard(self, folder: Path) -> None:
        """Have the server sweep up a Ray session's folder if it is still there when everybody has gone."""
        self._request({"op": "guard", "folder": str(folder)})

    def fork(self, spec: ChildSpec, fds: dict[str, int]) -> int:
        """Ask for a child; its id. ``fds`` must hold ``stdout`` and ``stderr``. The outcome comes as an event."""
        self._next += 1
        body = os.memfd_create("dltrain-spec")
        try:
            with os.fdopen(os.dup(body), "wb") as file:
                file.write(json.dumps(spec.to_json()).encode())
            named = {"spec": body, **fds}
            self._request({"op": "fork", "id": self._next, "fds": list(named)}, list(named.values()))
        finally:
            os.close(body)
        return self._next

    def signal(self, child: int, signum: int) -> None:
        """Send a signal to a child's process group; nothing happens when it has already ended."""
        self._request({"op": "signal", "id": child, "signal": int(signum)})

    def events(self, timeout: float = 0.0) -> list[ChildEvent]:
        """What happened since the last call, waiting at most ``timeout`` seconds for the first.

        Raises:
            HostError: the server died.
        """
        found: list[ChildEvent] = []
        select.select([self._sock], [], [], timeout)
        while True:
            try:
                found.append(_event(json.loads(self._receive())))
            except BlockingIOError:
                return found

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for an answer
        self._sock.close()
        log, self._log = self._log, -1
        if log >= 0:  # closed again, its number would be another file's
            os.close(log)

    def _receive(self) -> bytes:
        try:
            data = self._sock.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            raise HostError(f"the fork server died:\n{_tail(self._log)}")
        return data

    def _request(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        data = json.dumps(message).encode()
        while True:
            try:
                socket.send_fds(self._sock, [data], fds or [])
                return
            except BlockingIOError:
                if not select.select([], [self._sock], [], _REQUEST_TIMEOUT)[1]:
                    raise HostError(f"the fork server took no request for {_REQUEST_TIMEOUT:g} s") from None
            except ConnectionError:
                raise HostError(f"the fork server died:\n{_tail(self._log)}") from None


def _event(message: dict[str, Any]) -> ChildEvent:
    match message["op"]:
        case "forked":
            return ChildEvent(message["id"], pid=message["pid"])
        case "exited":
            exit_ = Exit(
                message["code"], message.get("signal"), message.get("at", time.time()), message.get("max_rss", 0)
            )
            return ChildEvent(message["id"], exit=exit_, what=message.get("what", ""))
        case _:
            raise HostError(f"the fork server sent {message}")


def _said(log: int) -> bool:
    return os.fstat(log).st_size > 0


def _tail(log: int, size: int = 4000) -> str:
    end = os.lseek(log, 0, os.SEEK_END)
    return os.pread(log, size, max(0, end - size)).decode(errors="replace").strip() or "(it printed nothing)"
