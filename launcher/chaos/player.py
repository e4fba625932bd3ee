"""Plays faults against one run: starts its command, watches its ranks from outside, sends real signals, cuts links."""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .faults import KINDS, Fault
from .watch import Seat, Watch

_POLL = 0.002
_SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


class Links(Protocol):
    """Links of machines that can be cut: :class:`~.lan.Lan`'s."""

    def cut(self, address: str, seconds: float) -> None:
        """Cut the link of the machine at ``address`` for so long."""
        ...

    def mend(self) -> None:
        """Mend the links whose time is over."""
        ...


@dataclass
class Played:
    """A fault that has happened.

    Attributes:
        at: ``time.monotonic()`` seconds.
        generation: of the ranks that it happened to.
        mark: the most steps that these ranks, and all before them, had done.
        back: seconds from the fault to the end of the first step that had not been done before; None until then, and
            for good where the ranks went on as if nothing had happened.
        sat_out: it was over before anything was started again.
    """

    fault: Fault
    at: float
    generation: int
    mark: int
    back: float | None = None
    sat_out: bool = False


@dataclass
class Performance:
    """What came of a command that faults were played against.

    Attributes:
        code: exit code of the command, of its last start.
        seconds: from the start of the command to its end.
        steps_again: how many steps were done more than once.
        starts: how often ranks were started.
        steps: the most that any rank had done.
        late: it had not ended in time, or had come to no other step for too long, and was killed.
    """

    code: int = 0
    seconds: float = 0.0
    played: list[Played] = field(default_factory=list[Played])
    steps_again: int = 0
    starts: int = 0
    steps: int = 0
    total_steps: int = 0
    late: bool = False


class Player:
    """Plays one schedule.

    Args:
        command: starts the run, and goes on with it when it is started again.
        log: takes the command's output.
        watch: looks at the run that the command makes.
        faults: what is to happen.
        links: of the nodes' machines, where they have any.
        limit: seconds after which the command is killed.
        still: seconds after which it is killed if no rank has come further.
        interrupted: called all the time; raises to give up.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        watch: Watch,
        faults: Sequence[Fault],
        *,
        links: Links | None,
        limit: float,
        still: float,
        interrupted: Callable[[], None],
    ) -> None:
        self._command, self._log, self._watch = command, log, watch
        self._limit, self._still = limit, still
        self._interrupted, self._links = interrupted, links
        self._left = list(faults)
        self._done = Performance()
        self._first_step = math.inf
        self._furthest, self._moved = -1, math.inf
        self._process: subprocess.Popen[bytes] | None = None

    def play(self) -> Performance:
        """Start the command and see it to its end."""
        begin = self._moved = time.monotonic()
        process = self._start()
        try:
            while True:
                code = process.poll()
                self._watch.look()
                self._note_progress()
                if self._links is not None:
                    self._links.mend()
                if code is None:
                    for fault in [fault for fault in self._left if self._due(fault)]:
                        self._strike(fault)
                elif code == -signal.SIGKILL and self._killed_driver():
                    process = self._start()
                else:
                    self._done.code = code
                    break
                now = time.monotonic()
                if now - begin > self._limit or now - self._moved > self._still:
                    self._done.late = True
                    break
                self._interrupted()
                time.sleep(_POLL)
        finally:
            self._end()
            self._watch.close()
        done = self._done
        done.seconds = time.monotonic() - begin
        done.steps_again, done.starts = self._watch.steps_again(), len(self._watch.starts)
        done.steps, done.total_steps = self._watch.furthest, self._watch.total_steps
        return done

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self._process

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _killed_driver(self) -> bool:
        """Whether the last thing that happened to the driver was ours."""
        return any(played.fault.kind == "driver" and played.back is None for played in self._done.played)

    def _due(self, fault: Fault) -> bool:
        if fault.seconds is not None:
            return time.monotonic() - self._first_step >= fault.seconds
        assert fault.step is not None
        seats = self._watch.seats.values()
        there = [seat for seat in seats if _concerns(fault, seat) and seat.beat.step >= fault.step]
        return any(seat.process.alive for seat in there)

    def _strike(self, fault: Fault) -> None:
        """Have the fault happen; where there is nobody for it to happen to just now, it is tried again later."""
        mark = self._watch.furthest
        at = time.monotonic()
        if fault.kind == "driver":
            struck = self._strike_driver()
        elif fault.kind == "node":
            struck = self._strike_node(fault.target)
        elif fault.kind == "partition":
            struck = self._strike_link(fault)
        else:
            seat = self._watch.seats.get(fault.target)
            struck = seat is not None and _strike_rank(fault, seat)
        if struck:
            self._left.remove(fault)
            self._done.played.append(Played(fault, at, self._watch.generation, mark))

    def _strike_driver(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            return False
        self._process.kill()
        self._process.wait()
        return True

    def _strike_node(self, node: int) -> bool:
        agent = self._watch.agent(node)
        if agent is None or not agent.signal(signal.SIGKILL):
            return False
        for seat in self._watch.seats.values():
            if seat.node == node:
                seat.process.signal(signal.SIGKILL)
        return True

    def _strike_link(self, fault: Fault) -> bool:
        assert self._links is not None, "partitions are played where there are links"
        assert fault.lasts is not None
        address = self._watch.address(fault.target)
        if address:
            self._links.cut(address, fault.lasts)
        return bool(address)

    def _note_progress(self) -> None:
        """Find out which faults the run has got over."""
        watch = self._watch
        now = time.monotonic()
        if watch.furthest > self._furthest:
            self._furthest, self._moved = watch.furthest, now
        if watch.furthest >= 0:
            self._first_step = min(self._first_step, now)
        for played in self._done.played:
            if played.back is None and not played.sat_out and KINDS[played.fault.kind].interrupts:
                before = [mark for generation, mark in watch.marks.items() if generation <= played.generation]
                known, played.mark = played.mark, max([played.mark, *before])
                if watch.generation > played.generation and watch.marks.get(watch.generation, -1) > played.mark:
                    played.back = now - played.at
                lasts = played.fault.lasts
                over = lasts is not None and now - played.at > lasts
                played.sat_out = over and watch.generation == played.generation and played.mark > known


def _concerns(fault: Fault, seat: Seat) -> bool:
    """Whether the seat is the fault's target, or one of several."""
    unit = KINDS[fault.kind].unit
    return not unit or fault.target == (seat.rank if unit == "rank" else seat.node)


def _strike_rank(fault: Fault, seat: Seat) -> bool:
    """Send the fault's signal; whether there was a process to get it."""
    process = seat.persister() if fault.kind == "persister" else seat.process
    signum = _SIGNALS.get(fault.kind, signal.SIGKILL)
    with contextlib.suppress(PermissionError):
        return process is not None and seat.beat.phase != "end" and process.signal(signum)
    return False
