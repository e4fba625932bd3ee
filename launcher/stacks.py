"""Python stacks of a rank that cannot answer otherwise: its process writes them into a file in memory on a signal.

The handler is faulthandler's, in C: it needs neither the interpreter lock nor the main thread, so it also answers for a
rank that waits in a collective. A stopped process (SIGSTOP) answers nothing, which its state tells.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.processes import Process

#: A real-time signal, which neither Python, torch nor a batch system uses.
SIGNAL = signal.SIGRTMIN + 11

_SETTLED = 5  # looks in a row without growth after which an answer is whole: looks, as the machine may stand still
_POLL = 0.02
_THREAD = re.compile(r"^(?:Current thread|Thread) \S+.*$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.+)", line \d+ in .+$', re.MULTILINE)
_LIBRARIES = ("/torch/", "/deepspeed/")
_WAITING = ("/torch/distributed/", "/torch/autograd/", "/torch/nn/parallel/", "/deepspeed/comm/")


def answer(fd: int) -> None:
    """From now on, have this process write the stacks of all its threads to ``fd`` on every :data:`SIGNAL`."""
    faulthandler.register(SIGNAL, file=fd, all_threads=True)


@dataclass(frozen=True)
class Look:
    """What was seen of a rank's process.

    Attributes:
        state: what the kernel says that it does, as :attr:`Process.state`.
        stacks: of all its threads, the main thread's last; empty if it did not answer.
    """

    state: str
    stacks: str = ""

    @property
    def stopped(self) -> bool:
        """Whether it was stopped from outside."""
        return self.state == "T"

    @property
    def main(self) -> str:
        """The main thread's frames, innermost first."""
        return "\n".join(match[0] for match in _FRAME.finditer(_THREAD.split(self.stacks)[-1]))

    @property
    def waits(self) -> bool:
        """Whether the main thread is in a collective, or in backward, which hides them: nearer than any user's code."""
        for match in _FRAME.finditer(self.main):
            if any(folder in match[1] for folder in _WAITING):
                return True
            if not any(folder in match[1] for folder in _LIBRARIES):
                break
        return False

    def why_silent(self) -> str:
        """Why there are no stacks, in words."""
        match self.state:
            case "T":
                return "its process is stopped (SIGSTOP or the like), and cannot show its stack"
            case "D":
                return "its process waits in the kernel, for a disk or another device, and cannot show its stack"
            case "":
                return "its process is gone"
            case _:
                return "its process did not show its stack in time"


@dataclass
class Sheet:
    """The file in memory that one rank writes its stacks into, on the agent's side."""

    fd: int = field(default_factory=lambda: os.memfd_create("dltrain-stacks"))

    def close(self) -> None:
        os.close(self.fd)


def look_at(ranks: Mapping[int, tuple[Process, int]], timeout: float) -> dict[int, Look]:
    """Look at the processes of ranks, given each with the descriptor of its sheet, for at most ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    begun = {rank: os.fstat(fd).st_size for rank, (_, fd) in ranks.items()}
    seen, quiet = dict(begun), dict.fromkeys(begun, 0)
    states = {rank: process.state for rank, (process, _) in ranks.items()}
    waiting = {rank for rank, state in states.items() if state not in ("", "T", "Z")}
    for rank in waiting:
        ranks[rank][0].signal(SIGNAL)
    while waiting and time.monotonic() < deadline:
        time.sleep(_POLL)
        for rank in list(waiting):
            size = os.fstat(ranks[rank][1]).st_size
            quiet[rank] = quiet[rank] + 1 if size == seen[rank] > begun[rank] else 0
            seen[rank] = size
            if quiet[rank] == _SETTLED:
                waiting.discard(rank)
    return {rank: Look(states[rank], _read(fd, begun[rank], seen[rank])) for rank, (_, fd) in ranks.items()}


def _read(fd: int, begin: int, end: int) -> str:
    with contextlib.suppress(OSError):
        return os.pread(fd, end - begin, begin).decode(errors="replace")
    return ""
