"""The process that makes one rank's snapshots durable. Training waits only until they are in memory. No torch.

It is given the memory of a snapshot as file descriptors without a name, so whoever dies leaves nothing behind. It
outlives its rank as long as it takes to finish the snapshots it was given, half a minute at most, and ends at once when
the node's agent is gone.

    from the rank   {"t": "open", …}, {"t": "save", "step"} with two descriptors, {"t": "drop", "step"}
    to the rank     {"t": "ended", "step", "why", "cost"}, {"t": "trouble", "step", "why"},
                    {"t": "say", …} without an agent
    to the agent    {"t": "note"|"saved"|"trouble"|"settle", …}
    from the agent  {"t": "settled", "step"}, {"t": "alone"}
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..core.errors import DltrainError
from ..core.storage import Storage
from ..core.wire import Channel
from .image import DATA
from .lease import RENEW, Lease, renew
from .retention import Best, prune
from .saving import GivenUp, Patience, Saving, Snapshot, snapshot_from

AFTERLIFE = 30.0
"""Seconds that a snapshot gets when its rank is gone."""

# Seconds until a checkpoint is completed although the metrics before it are not on the disk: longer than a node that
# tells nothing is waited for, as the metrics that it holds up are lost with it and must be computed again.
_SETTLE = 45.0
_ALONE, _ALONE_WHY = 1.0, "the other ranks have ended"
_REPLACED = "a newer one took its place"
_STUCK = 2.0  # seconds that a request to the storage gets when nobody waits for it any more
_MAX_MESSAGE = 1 << 20
_PR_SET_NAME = 15


@dataclass
class _Task:
    """A snapshot that was given; the first is being written, the others wait."""

    snapshot: Snapshot
    patience: Patience = field(default_factory=Patience)
    done: bool = False
    replaced: bool = False


class Persister:
    """The process's main thread: hears the rank and the agent. Another thread does the writing.

    Args:
        rank: a socket of messages (SOCK_SEQPACKET) to the rank.
        agent: the socket to the node's agent, under ``dltrain launch``.
    """

    def __init__(self, rank: socket.socket, agent: Channel | None) -> None:
        rank.setblocking(False)
        self._rank, self._agent = rank, agent
        self._rank_gone = False
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._setup: dict[str, Any] = {}
        self._storage: Storage | None = None
        self._best: Best | None = None
        self._lost: Lease | None = None
        self._images: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._settled = 0
        self._tasks: deque[_Task] = deque()
        self._alone = False
        self._stuck_until = float("inf")

    def run(self) -> None:
        """Serve until the rank is gone and what it gave is durable, or the agent is gone."""
        while not (self._rank_gone and not self._tasks):
            sockets: list[Any] = [self._wake_r]
            sockets += [] if self._rank_gone else [self._rank]
            sockets += [] if self._agent is None else [self._agent]
            left = self._stuck_until - time.monotonic()
            if left <= 0:
                return
            ready, _, _ = select.select(sockets, [], [], min(left, 3600.0))
            if self._wake_r in ready:
                os.read(self._wake_r, 4096)
                self._go_on()
            if self._rank in ready:
                self._hear_rank()
            if self._agent is not None and self._agent in ready and not self._hear_agent():
                return
        if self._agent is not None:
            with self._lock:
                self._agent.flush(5.0)

    # ---- hearing

    def _hear_rank(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._rank, _MAX_MESSAGE, 2)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._rank_gone = True
            self._end_within(AFTERLIFE, f"its rank was gone for {AFTERLIFE:g} s")
            return
        message: dict[str, Any] = json.loads(data)
        match message["t"]:
            case "open":
                self._setup = message
                self._best = Best(**message["best"])
                _set_process_name(f"dltrain-save{message['rank']}")
                if message["lease"]:
                    threading.Thread(target=self._renew, daemon=True).start()
            case "save":
                self._add(_Task(self._take(*fds)))
            case "drop":
                self._drop(message["step"])
            case other:
                raise ValueError(f"the rank sent a message of kind {other!r}")

    def _hear_agent(self) -> bool:
        """Take in what the agent says; whether it is still there."""
        assert self._agent is not None
        with self._lock:
            messages = self._agent.receive()
        for message in messages:
            match message["t"]:
                case "settled":
                    with self._news:
                        self._settled = max(self._settled, message["step"])
                        self._news.notify_all()
                case "alone":
                    self._alone = True
                    self._end_within(_ALONE, _ALONE_WHY)
                case other:
                    raise ValueError(f"the agent sent a message of kind {other!r}")
        return not self._agent.closed

    def _end_within(self, seconds: float, why: str) -> None:
        if self._tasks:
            for task in self._tasks:
                task.patience.end(why, within=seconds)
            self._stuck_until = min(self._stuck_until, time.monotonic() + seconds + _STUCK)

    # ---- saving

    def _take(self, image: int, text: int) -> Snapshot:
        """The snapshot in two descriptors. Their memory stays mapped, as the rank uses the same again and again."""
        inode, size = os.fstat(image).st_ino, os.fstat(image).st_size
        if inode not in self._images:
            if len(self._images) > 3:  # the rank has made larger ones
                self._images.clear()
            self._images[inode] = mmap.mmap(image, size, prot=mmap.PROT_READ)
        os.close(image)
        with os.fdopen(text, "rb") as file:
            file.seek(0)
            return snapshot_from(file.read(), memoryview(self._images[inode])[DATA:])

    def _add(self, task: _Task) -> None:
        self._tasks.append(task)
        if self._alone:
            self._end_within(_ALONE, _ALONE_WHY)
        if len(self._tasks) == 1:
            self._begin()

    def _drop(self, step: int) -> None:
        for task in list(self._tasks):
            if task.snapshot.step == step:
                task.replaced = True
                task.patience.end(_REPLACED)
                if task is not self._tasks[0]:
                    self._tasks.remove(task)
                    self._answer({"t": "ended", "step": step, "why": _REPLACED, "cost": {}})

    def _begin(self) -> None:
        threading.Thread(target=self._save, args=(self._tasks[0],), daemon=True).start()

    def _go_on(self) -> None:
        """Begin with the next snapshot where the thread has ended with one."""
        if self._tasks and self._tasks[0].done:
            self._tasks.popleft()
            if self._tasks:
                self._begin()

    def _save(self, task: _Task) -> None:
        """Make it durable and tell. Runs in a thread of its own."""
        snapshot, why, size = task.snapshot, "", 0
        try:
            size = Saving(
                self._open(),
                snapshot,
                task.patience,
                on_trouble=lambda why: self._trouble(snapshot, why),
                before_commit=lambda: self._before_commit(snapshot),
            ).run()
        except GivenUp as ended:
            why = str(ended)
        except (ValueError, DltrainError) as error:
            why = str(error)
        except BaseException as error:  # the rank must hear of it, whatever it is
            why = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        cost: dict[str, float] = {}
        if snapshot.rank == 0 and not why:
            cost = _cost(snapshot, size)
            self._say({"t": "saved", "step": snapshot.step, "cost": cost})
            self._prune()
        elif snapshot.rank == 0 and not task.replaced:
            self._say({"t": "note", "text": f"checkpoint of step {snapshot.step} not written: {why}"})
        self._answer({"t": "ended", "step": snapshot.step, "why": why, "cost": cost})
        task.done = True
        os.write(self._wake_w, b".")

    def _open(self) -> Storage:
        if self._storage is None:
            self._storage = Storage(self._setup["url"], self._setup["options"])
        return self._storage

    def _prune(self) -> None:
        try:
            prune(self._open(), self._setup["keep"], self._best)
        except (OSError, ValueError, DltrainError) as error:
            self._say({"t": "note", "text": f"older checkpoints cannot be removed: {error}"})

    def _trouble(self, snapshot: Snapshot, why: str) -> None:
        self._answer({"t": "trouble", "step": snapshot.step, "why": why})
        self._say({"t": "trouble", "step": snapshot.step, "rank": snapshot.rank, "why": why})

    def _before_commit(self, snapshot: Snapshot) -> None:
        """Raises GivenUp if there must be no manifest: this run has lost the folder, say."""
        self._settle(snapshot)
        other = self._lost or renew(self._open(), self._setup["lease"])
        if other is not None:
            raise GivenUp(f"{other} has taken over {self._open()}")

    def _renew(self) -> None:
        """Keep the folder this run's. Runs in a thread of its own, on rank 0."""
        while not self._rank_gone:
            with contextlib.suppress(OSError, DltrainError):  # the next time, or before a manifest is written
                self._lost = renew(self._open(), self._setup["lease"])
            if self._lost is not None:
                text = f"{self._lost} has taken over {self._open()}: no checkpoint is written any more"
                self._say({"t": "note", "text": text})
                return
            time.sleep(RENEW)

    def _settle(self, snapshot: Snapshot) -> None:
        """Wait until the metrics before the snapshot are on the disk: a checkpoint must not be ahead of them."""
        row = snapshot.row
        if self._agent is None or row == 0:
            return
        self._say({"t": "settle", "step": row})
        with self._news:
            if self._news.wait_for(lambda: self._settled >= row, _SETTLE):
                return
        if self._rank_gone:
            raise GivenUp("its rank is gone, and metrics before it did not arrive")
        text = f"the metrics were not on the disk within {_SETTLE:g} s; saving all the same"
        self._say({"t": "note", "text": text})

    # ---- telling

    def _say(self, message: Mapping[str, Any]) -> None:
        """Tell the user, through the agent or else through the rank."""
        if self._agent is None:
            self._answer({"t": "say", "message": message})
        else:
            with self._lock:
                self._agent.send(dict(message))

    def _answer(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a rank that is gone needs no answer
            self._rank.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL)


def _cost(snapshot: Snapshot, size: int) -> dict[str, float]:
    """What a checkpoint has cost: seconds that a step waited, seconds until it was complete, bytes of its tensors."""
    seconds = time.time() - snapshot.taken
    return {"stall_seconds": round(snapshot.stall, 4), "durable_seconds": round(seconds, 3), "bytes": size}


def become(rank: socket.socket, agent: socket.socket | None) -> NoReturn:
    """Be the persister, and end the process. The process may be a fork of the rank, before it has threads."""
    code = 1
    try:
        os.setsid()  # signals to the rank's group, or from the terminal, are not for this process
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # whoever tells a whole node to end gives it the time to save
        _keep_only({0, 1, 2, rank.fileno(), *([] if agent is None else [agent.fileno()])})
        _set_process_name("dltrain-save")
        Persister(rank, None if agent is None else Channel(agent)).run()
        code = 0
    except BaseException:  # the last frame of a process
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _keep_only(kept: set[int]) -> None:
    """Close every other descriptor: the rank's end is told by its sockets, which this process must not hold open."""
    begin = 0
    for end in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
        if begin < end:  # CPython closes all when asked for an empty range from 0
            os.closerange(begin, end)
        begin = end + 1


def _set_process_name(label: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, label.encode()[:15], 0, 0, 0)


def main() -> None:
    fds = {name: int(fd) for name, _, fd in (word.partition("=") for word in sys.argv[1:])}
    agent = socket.socket(fileno=fds["agent"]) if "agent" in fds else None
    become(socket.socket(fileno=fds["rank"]), agent)


if __name__ == "__main__":
    main()
