"""The fork server: a process that has imported torch once and becomes ranks by forking.

    python -P -m dltrain.launcher.forkserver NAME SECONDS MODULE…

It listens on the abstract Unix socket NAME (no file to leave behind), imports what its children need, and then forks on
request. It stays single-threaded and never touches an accelerator, or a fork of it would be unusable. Whoever is
connected holds a lease: when a client's connection closes, for whatever reason, the children it asked for are killed;
when the last one closes, the server ends (after ``keep_warm`` seconds, if a client asked for that). It also sweeps up
the Ray session of a launcher that was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .entry import run_child
from .janitor import sweep
from .messages import ChildSpec, Exit

#: Imported before the first fork: what the first optimizer step would import (`torch._dynamo`, a second per rank), and
#: the first checkpoint of shards.
PRELOAD = (
    *("torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo"),
    *("torch.distributed.checkpoint.planner_helpers", "dltrain.training.worker"),
)

#: Likewise where nothing is to be trained: what looking at a cluster takes, in less than half the time.
PRELOAD_PROBE = ("dltrain.training.links",)

#: The code with which a server ends where another one of its name is there.
TAKEN = os.EX_TEMPFAIL

_MAX_MESSAGE = 1 << 16
_MAX_FDS = 8
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> None:
    """prctl(2) of the calling process; raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@dataclass
class _Client:
    sock: socket.socket
    children: dict[int, int] = field(default_factory=dict[int, int])
    """Living children by the id that the client gave them: their process ids."""


class _Server:
    def __init__(self, listener: socket.socket, facts: dict[str, Any]) -> None:
        self._listener = listener
        self._facts = facts
        self._clients: dict[int, _Client] = {}
        self._keep_warm = 0.0
        self._guarded: set[Path] = set()
        self._idle_since = time.monotonic()
        self._ever_used = False
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._terminated = False

    def serve(self, first_client_timeout: float) -> None:
        """Answer until nobody is connected any more (or nobody connects within ``first_client_timeout`` seconds)."""
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _noticed)  # a handler, so that the wake-up descriptor is written
        signal.signal(signal.SIGTERM, self._terminate)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_r, selectors.EVENT_READ, self._reap)
        while self._clients or not self._terminated:  # who holds a lease ends it, or is gone
            limit = self._keep_warm if self._ever_used else first_client_timeout
            left = None if self._clients else self._idle_since + limit - time.monotonic()
            if left is not None and left <= 0:
                break
            for key, _ in self._selector.select(left):
                key.data()
        for client in list(self._clients.values()):
            self._drop(client)
        for folder in self._guarded:
            if folder.exists():  # the launcher was killed, or it would have removed it
                sweep(folder)

    def _terminate(self, *_: object) -> None:
        self._terminated = True

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._listener.accept()
            if peer_uid(sock) not in (os.getuid(), 0):
                sock.close()
                return
            sock.settimeout(5)
            client = _Client(sock)
            self._clients[sock.fileno()] = client
            self._ever_used = True
            self._selector.register(sock, selectors.EVENT_READ, lambda: self._read(client))

    def _read(self, client: _Client) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(client.sock, _MAX_MESSAGE, _MAX_FDS)
        except OSError:
            data, fds = b"", []
        if not data:
            self._drop(client)
            return
        try:
            self._answer(client, json.loads(data), list(fds))
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, client: _Client, message: dict[str, Any], fds: list[int]) -> None:
        match message["op"]:
            case "hello":
                self._keep_warm = max(self._keep_warm, float(message["keep_warm"]))
                self._send(client, {"op": "ready", **self._facts})
            case "guard":
                self._guarded.add(Path(message["folder"]))
            case "fork":
                self._fork(client, message, fds)
            case "signal":
                pid = client.children.get(message["id"])
                if pid is not None:
                    _signal(pid, message["signal"])
            case other:
                self._send(client, {"op": "error", "what": f"unknown request {other!r}"})

    def _fork(self, client: _Client, message: dict[str, Any], fds: list[int]) -> None:
        if len(fds) != len(message["fds"]):
            what = "the fork server has no file descriptors left (ulimit -n)"
            self._send(client, {"op": "exited", "id": message["id"], "code": 127, "what": what})
            return
        named = dict(zip(message["fds"], fds, strict=True))
        spec_fd = named.pop("spec")
        with os.fdopen(spec_fd, "rb", closefd=False) as file:
            file.seek(0)
            spec = ChildSpec.from_json(json.load(file))
        try:
            pid = os.fork()
        except OSError as error:
            self._send(client, {"op": "exited", "id": message["id"], "code": 127, "what": f"fork failed: {error}"})
            return
        if pid == 0:
            os.close(spec_fd)
            self._become(spec, named)
        client.children[message["id"]] = pid
        self._send(client, {"op": "forked", "id": message["id"], "pid": pid})

    def _become(self, spec: ChildSpec, fds: dict[str, int]) -> NoReturn:
        """In the child: let go of everything that is the server's, then run the spec. Never returns."""
        try:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._selector.close()
            self._listener.close()
            for client in self._clients.values():
                client.sock.close()
            os.close(self._wake_r)
            os.close(self._wake_w)
            for fd in fds.values():
                os.set_inheritable(fd, False)
            run_child(spec, fds)
        finally:
            os._exit(70)  # run_child ends the process itself; coming here means it could not

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 4096)
        owners = {pid: (client, key) for client in self._clients.values() for key, pid in client.children.items()}
        for pid, (client, key) in owners.items():
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                del client.children[key]
                exit_ = self._bury(pid)
                self._send(client, {"op": "exited", "id": key, **asdict(exit_)})
        self._reap_strays(set(owners))

    @staticmethod
    def _bury(pid: int) -> Exit:
        """Reap a dead child after killing what is left of its process group (its own helpers must not outlive it)."""
        at = time.time()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return Exit(code if code >= 0 else None, -code if code < 0 else None, at, usage.ru_maxrss * 1024)

    @staticmethod
    def _reap_strays(children: set[int]) -> None:
        """Reap dead grandchildren that fell to this process (it is their subreaper)."""
        for pid in _own_children() - children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _drop(self, client: _Client) -> None:
        """End a lease: kill the client's children, and strays once no child of anyone is left.

        They are reaped as strays when they are gone: one that the kernel holds back must not hold back this server.
        """
        self._selector.unregister(client.sock)
        del self._clients[client.sock.fileno()]
        client.sock.close()
        for pid in client.children.values():
            _signal(pid, signal.SIGKILL)
        if not any(other.children for other in self._clients.values()):
            _kill_all_children()
        self._idle_since = time.monotonic()

    def _send(self, client: _Client, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a client that is gone is noticed by its next read
            client.sock.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL)


def _noticed(*_: object) -> None:
    pass


def _signal(pid: int, number: int) -> None:
    """Send a signal to a child that was not reaped yet, and to its process group."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:  # forked so lately that it has not made its own group yet
        os.kill(pid, number)


def _own_children() -> set[int]:
    with contextlib.suppress(OSError):
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    return set()


def _kill_all_children() -> None:
    deadline = time.monotonic() + 5
    while (pids := _own_children()) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)


def peer_uid(sock: socket.socket) -> int:
    """User id of the process at the other end of a connected Unix socket."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[4:8], sys.byteorder)


def _preload(names: Sequence[str]) -> dict[str, Any]:
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page with an object on it
    threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    return {
        "pid": os.getpid(),
        "torch": sys.modules["torch"].__version__,
        "threads": threads,
    }


def main() -> None:
    """Bind the socket, detach, preload, serve. A second server of the same name ends at once: the first serves all."""
    name, first_client_timeout, preload = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind("\0" + name)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            sys.exit(TAKEN)
        raise
    listener.listen(64)
    listener.setblocking(False)
    if os.fork():  # leave the starter's family: a Ray worker's children are killed when it exits
        os._exit(0)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _Server(listener, _preload(preload)).serve(first_client_timeout)


if __name__ == "__main__":
    main()
