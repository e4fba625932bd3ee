"""Several machines in one: network namespaces on a common bridge, each with a host name, an address and its mounts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_NAMESPACES = ("--net", "--uts", "--mount")


def why_not() -> str:
    """What is missing here for :class:`Machine`; empty where nothing is."""
    if missing := [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]:
        return f"needs {', '.join(missing)}"
    done = subprocess.run(
        ["unshare", *_NAMESPACES, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, text=True
    )
    return f"needs the right to make network namespaces: {done.stderr.strip()}" if done.returncode else ""


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
        subprocess.run([*self.prefix, *command], check=True, capture_output=True)

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

    def pull_the_cable(self) -> None:
        """Cut it off, so that nobody hears that it is gone, and end what runs on it."""
        self.cut()
        while pids := self.processes():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


@contextmanager
def machines(count: int, *, hidden: Mapping[int, Path] | None = None) -> Iterator[list[Machine]]:
    """Machines on one network. They share this one's files, except that each sees an empty folder at ``hidden``."""
    with ExitStack() as stack:
        switch = stack.enter_context(_machine("switch", "", None))
        switch.run("ip", "link", "add", "br0", "type", "bridge")
        switch.run("ip", "link", "set", "br0", "up")
        found: list[Machine] = []
        for number in range(count):
            folder = (hidden or {}).get(number)
            machine = stack.enter_context(_machine(f"m{number}", f"10.77.0.{number + 1}", folder))
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
def _machine(name: str, address: str, hidden: Path | None) -> Iterator[Machine]:
    hide = f"mount -t tmpfs tmpfs '{hidden}' && " if hidden else ""
    command = ["unshare", *_NAMESPACES, "sh", "-c", f"hostname {name} && {hide}echo up && exec sleep infinity"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield Machine(process.pid, name, address)
    finally:
        process.kill()
        process.communicate()
