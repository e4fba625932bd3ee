"""A Ray cluster over several machines that are made of this one, each node with a link that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ...core.errors import JobError, Problem
from ...core.job import Job
from ..cluster import OBJECT_STORE, ClusterError, session_folder
from ..demand import demand_here
from .machines import Machine, machines, why_not
from .stand import Stand

_PORT = 6379
_UP = "Ray runtime started"
_TURN = 0.05
_PATIENCE = 60.0  # seconds that a node of Ray may take to start where the job allows less for a start of ranks
_GOODBYE = 10.0  # seconds that it may take to sign off
_TAIL = 12  # lines of a failed start that are told
_WARM = "1min"


@dataclass
class _Member:
    """A machine, the process ``ray start --block`` on it, and its output.

    Attributes:
        until: ``time.monotonic()`` seconds when its link is to be mended; None while it is whole.
        suspect: it was cut off from the others, who may have given it up.
    """

    machine: Machine
    log: Path
    process: subprocess.Popen[bytes] | None = None
    until: float | None = None
    suspect: bool = False


class Lan(Stand):
    """A cluster of several machines, whose links can be cut.

    The first machine has Ray's head and the launchers, and no node: those are what can be cut off, one on each of the
    others. There are more of these than nodes, for the place of those that are cut off.

    Args:
        cuts: how often a node may be cut off in one launch.
    """

    placement = "spread"
    options = ("--keep-warm", _WARM)

    def __init__(self, job: Job, cuts: int, interrupted: Callable[[], None]) -> None:
        """Check what can be checked before anything starts; raises JobError."""
        if reason := why_not():
            raise JobError(Problem("no node's link can be cut here", "--faults, 'partition'", reason))
        super().__init__(demand_here(job.resources.model_copy(update={"placement": "pack"}), job.recovery.spares))
        if self.demand.gpus:
            what = "the machines that partitions are played on have no GPUs"
            raise JobError(Problem(what, "--faults, 'partition'", "CUDA_VISIBLE_DEVICES= hides them, for CPUs"))
        self._timeout = max(job.recovery.start_timeout, _PATIENCE)
        self._count = 1 + self.demand.places + cuts
        self._interrupted = interrupted
        self._stack = ExitStack()
        self._members: list[_Member] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ready(self) -> None:
        """Mend links that are cut, and start Ray again on machines that were cut off.

        Raises:
            ClusterError: Ray did not start on one, or its head has ended.
        """
        head = self._members[0]
        assert head.process is not None
        if head.process.poll() is not None:
            raise ClusterError(f"Ray's head on {head.machine.name} has ended: {_tail(head.log)}")
        for member in [member for member in self._members if member.suspect or _ended(member)]:
            self._mend(member)
            _sign_off(member)
            self._begin(member, f"--address={self.address}")
            member.suspect = False

    def cut(self, address: str, seconds: float) -> None:
        """Cut the link of the machine at ``address`` for so long; :meth:`mend` mends it."""
        member = next(member for member in self._members if member.machine.address == address)
        member.machine.cut()
        member.until, member.suspect = time.monotonic() + seconds, True

    def mend(self) -> None:
        """Mend the links whose time is over."""
        now = time.monotonic()
        for member in self._members:
            if member.until is not None and member.until <= now:
                self._mend(member)

    def _mend(self, member: _Member) -> None:
        if member.until is not None:
            member.machine.heal()
            member.until = None

    def _start(self) -> None:
        folder = session_folder()
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        found = self._stack.enter_context(machines(self._count))
        self._members = [_Member(machine, folder / f"{machine.name}.log") for machine in found]
        for member in self._members:
            self._stack.callback(_end, member)
        head = self._members[0].machine
        self.address = f"{head.address}:{_PORT}"
        self.prefix = ("env", "RAY_AUTH_MODE=disabled", *head.prefix)  # nobody else is on this network
        role = ("--head", f"--port={_PORT}", "--include-dashboard=false", f"--temp-dir={folder}")
        for member in self._members:  # one after the other: they find names for their sockets in one folder
            self._begin(member, *role)
            role = (f"--address={self.address}",)

    def _begin(self, member: _Member, *role: str) -> None:
        """Start Ray on a machine, and wait until it is up."""
        cpus = 0 if member is self._members[0] else self.demand.cpus
        options = (
            *("--block", "--disable-usage-stats", f"--object-store-memory={OBJECT_STORE}", "--num-gpus=0"),
            *(f"--num-cpus={cpus}", f"--node-ip-address={member.machine.address}"),
        )
        ray = (sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *options, *role)
        with member.log.open("wb") as log:
            member.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *member.machine.prefix, *ray],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + self._timeout
        while _UP not in member.log.read_text(encoding="utf-8", errors="replace"):
            self._interrupted()
            if _ended(member) or time.monotonic() > deadline:
                late = "" if _ended(member) else f" within {self._timeout:g} s"
                raise ClusterError(f"Ray did not start on {member.machine.name}{late}: {_tail(member.log)}")
            time.sleep(_TURN)


def _environment() -> dict[str, str]:
    """What Ray starts with: nothing that was said for another cluster, and it leaves at once when it is told to."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return others | {"RAY_AUTH_MODE": "disabled", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}


def _ended(member: _Member) -> bool:
    return member.process is None or member.process.poll() is not None


def _sign_off(member: _Member) -> None:
    """Have a machine leave the cluster, which so knows at once, and end what is left on it."""
    if member.process is not None:
        member.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            member.process.wait(_GOODBYE)
    _end(member)


def _end(member: _Member) -> None:
    member.machine.end_processes()
    if member.process is not None:
        member.process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])
