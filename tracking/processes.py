"""Priority and end of a process together with everything it started."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """The processes below ``pid``, nearest first, as ``/proc`` shows them now (none where there is no ``/proc``)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # The second field is the program's name in parentheses, which may hold spaces and parentheses itself.
            parent = int(stat.read_bytes().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def kill_descendants(pid: int) -> None:
    """SIGKILL everything below ``pid``, even what is stopped or has a session of its own."""
    for child in descendants(pid):
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def run_in_gaps() -> None:
    """From now on, let this process and everything below it have a core only while nobody else wants it.

    A low priority is not enough where ranks take turns at computing and waiting for each other: it still lets a burst
    of work hold up the next step of all of them (sched(7), SCHED_IDLE). There is no way back without privileges.
    """
    while _put_in_gaps():  # a thread that had its turn still to come may have begun another meanwhile
        pass


def _put_in_gaps() -> bool:
    """Do it to the threads that there are now; whether there was one that had a core like others."""
    found = False
    for pid in (os.getpid(), *descendants(os.getpid())):
        for thread in Path(f"/proc/{pid}/task").glob("*"):
            with suppress(OSError):
                if os.sched_getscheduler(int(thread.name)) != os.SCHED_IDLE:
                    os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
                    found = True
    return found
