"""Several machines in one: network namespaces on a common bridge, each with a host name, an address and its mounts.

They share this machine's processes and files. Their network leads to each other and nowhere else. If the process that
made them is killed, they end, with all that runs on them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import DltrainError

_NAMESPACES = ("--net", "--uts", "--mount")
_TOOLS = ("ip", "unshare", "nsenter", "setpriv", "hostname")
_TRY = "ip link add br0 type bridge && ip link add port0 type veth peer name eth0"
_UP = "up\n"
# A machine's first process: when its standard input ends, since whoever made the machine is gone, all others end.
_FIRST = """
hostname "$0" && echo up && read -r _
exec > /dev/null 2>&1  # nobody reads what is said now
left=yes
while [ "$left" ]; do
    left=
    for at in /proc/[0-9]*; do
        if [ "$at" != "/proc/$$" ] && [ "$at/ns/net" -ef "/proc/$$/ns/net" ]; then
            kill -KILL "${at#/proc/}"
            left=yes
        fi
    done
    [ -z "$left" ] || sleep 0.05
done
"""
_PATIENCE = 30.0
_MOST = 254  # of a network with 8 bits for hosts


class MachineError(DltrainError):
    """A machine could not be made, or did not do what it was told."""


def why_not() -> str:
    """What is missing here for :class:`Machine`; empty where nothing is."""
    if missing := [name for name in _TOOLS if shutil.which(name) is None]:
        return f"it needs {', '.join(missing)} (Debian: iproute2, util-linux, hostname)"
    done = subprocess.run(["unshare", *_NAMESPACES, "sh", "-c", _TRY], capture_output=True, text=True, check=False)
    said = done.stderr.strip()
    return f"it needs the right to make network namespaces, as root has it: {said}" if done.returncode else ""


@dataclass(frozen=True)
class Machine:
    """A machine, alive as long as its first process.

    Attributes:
        pid: of the first process.
        address: IPv4 address of its interface ``eth0``.
    """

    pid: int
    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command to run it there, in the same working directory."""
        return ("nsenter", f"--target={self.pid}", *_NAMESPACES, "--wd=.", "--")

    def run(self, *command: str) -> None:
        """Run a short command there.

        Raises:
            MachineError: it failed; the text is what it said.
        """
        done = subprocess.run([*self.prefix, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise MachineError(f"'{' '.join(command)}' on {self.name}: {done.stderr.strip()}")

    def processes(self) -> list[int]:
        """Its processes, but for the first."""
        mine = Path(f"/proc/{self.pid}/ns/net").readlink()
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != self.pid:
                try:
                    if (entry / "ns/net").readlink() == mine:
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def named(self, name: str) -> list[int]:
        """Its processes by the name that ``ps`` shows."""
        found: list[int] = []
        for pid in self.processes():
            try:
                found += [pid] if Path(f"/proc/{pid}/comm").read_text().startswith(name) else []
            except OSError:
                continue
        return found

    def cut(self) -> None:
        """Cut its link: what runs on it goes on, and nobody hears of it."""
        self.run("ip", "link", "set", "eth0", "down")

    def heal(self) -> None:
        """Mend the link that was cut."""
        self.run("ip", "link", "set", "eth0", "up")

    def end_processes(self) -> None:
        """End what runs on it.

        Raises:
            MachineError: something did not end.
        """
        deadline = time.monotonic() + _PATIENCE
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise MachineError(f"processes on {self.name} did not end within {_PATIENCE:g} s: {pids}")
            time.sleep(0.01)

    def pull_the_cable(self) -> None:
        """Cut it off, so that nobody hears that it is gone, and end what runs on it."""
        self.cut()
        self.end_processes()


@contextmanager
def machines(count: int) -> Generator[list[Machine]]:
    """Machines m0, m1, … on one network.

    Raises:
        MachineError: they cannot be made; :func:`why_not` tells beforehand.
    """
    if count > _MOST:
        raise MachineError(f"{count} machines are too many for one network: {_MOST} at most")
    with ExitStack() as stack:
        switch = stack.enter_context(_machine("switch", ""))
        switch.run("ip", "link", "add", "br0", "type", "bridge")
        switch.run("ip", "link", "set", "br0", "up")
        found: list[Machine] = []
        for number in range(count):
            machine = stack.enter_context(_machine(f"m{number}", f"10.77.0.{number + 1}"))
            port = f"port{number}"
            peer = ("peer", "name", "eth0", "netns", str(machine.pid))
            switch.run("ip", "link", "add", port, "type", "veth", *peer)
            switch.run("ip", "link", "set", port, "master", "br0", "up")
            machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                machine.run("ip", "link", "set", interface, "up")
            found.append(machine)
        yield found


@contextmanager
def _machine(name: str, address: str) -> Generator[Machine]:
    """Its first process leads a session of its own, so that Ctrl-C does not take it away."""
    process = subprocess.Popen(
        ["unshare", *_NAMESPACES, "sh", "-c", _FIRST, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != _UP:
            process.kill()
            raise MachineError(f"{name} did not start: {process.communicate()[1].strip()}")
        yield Machine(process.pid, name, address)
    finally:
        process.kill()
        process.communicate()
