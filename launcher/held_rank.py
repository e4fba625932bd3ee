"""One rank as its agent holds it: how it is forked, and the ends of everything that it writes to."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.memory import kills
from ..core.processes import Process
from ..core.pulse import Pulse
from ..core.wire import Channel
from .host import ForkServer
from .messages import RankBeat, RankPlan, Stream
from .stacks import Sheet

_CHUNK = 1 << 16
_STREAMS: tuple[Stream, ...] = ("stdout", "stderr")


@dataclass
class Tail:
    """A file that a rank writes and the agent reads behind it."""

    stream: Stream
    fd: int

    def read(self) -> bytes:
        return os.read(self.fd, _CHUNK)

    def drained(self) -> bool:
        return os.lseek(self.fd, 0, os.SEEK_CUR) >= os.fstat(self.fd).st_size


@dataclass
class HeldRank:
    """A rank of the agent's node.

    Attributes:
        error_file: where elastic's ``@record`` leaves what a script raised.
        channel: from the rank.
        news: from its persister, which may outlive it; None where it has none.
        memory: over which descriptors of its snapshots come and go; None for a script.
        sheet: where it leaves its Python stacks.
        process: once it is forked.
        oom_kills: how many processes the kernel had killed for want of memory when it began.
        ended: it has exited.
    """

    plan: RankPlan
    generation: int
    error_file: Path
    channel: Channel
    news: Channel | None
    memory: socket.socket | None
    pulse: Pulse
    sheet: Sheet
    tails: list[Tail]
    oom_kills: tuple[int, int] = field(default_factory=kills)
    process: Process | None = None
    ended: bool = False

    def over(self) -> bool:
        """Whether nothing more can come of it."""
        return self.ended and all(tail.drained() for tail in self.tails) and (self.news is None or self.news.closed)

    def beat(self, now: float) -> RankBeat:
        """Where it is, at ``now`` (``time.monotonic()`` seconds)."""
        beat = self.pulse.read()
        pid = self.process.pid if self.process is not None else 0
        return RankBeat(self.plan.rank, beat.step, beat.phase, now - beat.at, pid)

    def recorded_error(self) -> dict[str, Any] | None:
        """What elastic's ``@record`` left, if anything."""
        try:
            data = json.loads(self.error_file.read_text())
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) else None  # pyright: ignore[reportUnknownVariableType]  # JSON

    def close(self) -> None:
        self.channel.close()
        if self.news is not None:
            self.news.close()
        if self.memory is not None:
            self.memory.close()
        self.pulse.close()
        self.sheet.close()
        for tail in self.tails:
            os.close(tail.fd)


def fork_rank(
    server: ForkServer,
    generation: int,
    plan: RankPlan,
    folder: Path,
    environ: Mapping[str, str],
    hand_over: Callable[[socket.socket], None],
) -> tuple[int, HeldRank]:
    """Ask for a fork that becomes the rank, with its output in ``folder``; the request's number, and our ends.

    ``hand_over`` is given our end of the memory socket, to put there what the rank goes on from.
    """
    error_file = folder / "error.json"
    with contextlib.suppress(FileNotFoundError):
        error_file.unlink()
    child = replace(plan.child, env={**environ, **plan.child.env, "TORCHELASTIC_ERROR_FILE": str(error_file)})
    channel, its_channel = socket.socketpair()
    pulse, sheet = Pulse.create(), Sheet()
    fds: dict[str, int] = {"channel": its_channel.fileno(), "pulse": pulse.fd}
    theirs = [its_channel]
    news = memory = None
    if child.kind == "worker":
        news, its_news = socket.socketpair()
        memory, its_memory = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory.setblocking(False)
        hand_over(memory)
        fds |= {"news": its_news.fileno(), "memory": its_memory.fileno(), "stacks": sheet.fd}
        theirs += [its_news, its_memory]
    tails: list[Tail] = []
    for stream in _STREAMS:
        path = folder / f"{stream}.log"
        fds[stream] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o644)
        tails.append(Tail(stream, os.open(path, os.O_RDONLY)))
    key = server.fork(child, fds)
    for stream in _STREAMS:
        os.close(fds[stream])
    for sock in theirs:
        sock.close()
    said = Channel(news) if news is not None else None
    return key, HeldRank(plan, generation, error_file, Channel(channel), said, memory, pulse, sheet, tails)
