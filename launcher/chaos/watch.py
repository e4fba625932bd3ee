"""A run as a process beside it sees it: its ranks, their pulses, and how far each start of them came. No hooks.

``status.json`` says which processes the ranks are. Their pulses are pages of memory that the kernel lets this user map
through ``/proc``, so a step is seen within a millisecond or two, and ranks do not know that anybody looks.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ...core.processes import Process, name_of
from ...core.pulse import Beat, Pulse
from ..live import FILE
from ..rundir import newest_run

_PULSE = "/memfd:dltrain-pulse"


@dataclass
class Seat:
    """A rank of this machine, seen from outside."""

    rank: int
    node: int
    generation: int
    process: Process
    pulse: Pulse

    @classmethod
    def find(cls, rank: int, node: int, generation: int, pid: int) -> Self | None:
        """The rank that is process ``pid``; None where that is no rank, or has gone."""
        process = Process.of(pid)
        if process is None or name_of(pid) != f"dltrain-rank{rank}"[:15]:
            return None
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(entry.readlink()).startswith(_PULSE):
                        return cls(rank, node, generation, process, Pulse(os.open(entry, os.O_RDWR | os.O_CLOEXEC)))
        return None

    @property
    def beat(self) -> Beat:
        return self.pulse.read()

    def persister(self) -> Process | None:
        """The process that writes its checkpoints."""
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for pid in map(int, children):
                if name_of(pid) == f"dltrain-save{self.rank}"[:15]:
                    return Process.of(pid)
        return None


@dataclass
class Watch:
    """Looks at the newest run of ``name`` in the folder ``runs``; nothing is asked of it.

    Attributes:
        seats: the ranks of the newest generation that has been seen, by number.
        marks: by generation, the most steps that one of its ranks was seen to have done.
        starts: by generation, after how many steps it began.
    """

    runs: Path
    name: str
    seats: dict[int, Seat] = field(default_factory=dict[int, Seat])
    marks: dict[int, int] = field(default_factory=dict[int, int])
    starts: dict[int, int] = field(default_factory=dict[int, int])
    total_steps: int = 0
    _run: Path | None = None
    _read: tuple[int, int] = (0, 0)

    @property
    def run(self) -> Path | None:
        """The run directory; None before there is one."""
        if self._run is None:
            path = newest_run(self.runs, self.name)
            self._run = path if path is not None and (path / "run.json").exists() else None
        return self._run

    @property
    def generation(self) -> int:
        """Of the ranks that are there, or were last; -1 before the first."""
        return max((seat.generation for seat in self.seats.values()), default=-1)

    @property
    def furthest(self) -> int:
        """The most steps that any rank was ever seen with; -1 before the first came so far."""
        return max(self.marks.values(), default=-1)

    def agent(self, node: int) -> Process | None:
        """The process of a node's agent."""
        host = self._host(node)
        return Process.of(host["agent"]) if host and name_of(host["agent"]).startswith("ray::") else None

    def address(self, node: int) -> str:
        """Of the machine that has the node now; empty where that is not known."""
        host = self._host(node)
        return host["address"] if host else ""

    def _host(self, node: int) -> dict[str, Any] | None:
        """What the run says of a node's machine."""
        with contextlib.suppress(OSError, ValueError):
            assert self.run is not None
            facts: dict[str, Any] = json.loads((self.run / "environment.json").read_text(encoding="utf-8"))
            return next((host for host in facts["hosts"] if host["node"] == node), None)
        return None

    def look(self) -> None:
        """See where the ranks are now."""
        facts = self._news()
        if facts:
            self.total_steps = facts["total_steps"] or self.total_steps
            self.starts |= {int(generation): step for generation, step in facts["starts"]}
            for rank in facts["ranks"]:
                self._seat(rank["rank"], rank["node"], facts["generation"], rank["pid"])
        for seat in self.seats.values():
            self._mark(seat)

    def steps_again(self) -> int:
        """How many steps were done that had been done before, over all starts of the ranks so far."""
        done = sum(max(0, mark - self.starts.get(generation, mark)) for generation, mark in self.marks.items())
        return max(0, done - self.furthest)

    def _seat(self, rank: int, node: int, generation: int, pid: int) -> None:
        there = self.seats.get(rank)
        if pid and (there is None or there.process.pid != pid or not there.process.alive):
            found = Seat.find(rank, node, generation, pid)
            if found is not None:
                if there is not None:
                    self._mark(there)  # it may have come further since the last look
                    there.pulse.close()
                self.seats[rank] = found

    def _mark(self, seat: Seat) -> None:
        step = seat.beat.step
        if step >= 0:
            self.marks[seat.generation] = max(step, self.marks.get(seat.generation, 0))

    def _news(self) -> dict[str, Any]:
        """What the driver has written since the last look; empty where it has not."""
        if self.run is None:
            return {}
        path = self.run / FILE
        with contextlib.suppress(OSError, ValueError):
            stat = path.stat()
            if (stat.st_ino, stat.st_mtime_ns) != self._read:
                facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                self._read = (stat.st_ino, stat.st_mtime_ns)
                return facts
        return {}

    def close(self) -> None:
        for seat in self.seats.values():
            seat.pulse.close()
        self.seats.clear()
