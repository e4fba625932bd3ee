"""Real sshds on machines of :mod:`dltrain.launcher.chaos.machines`, and an ssh that knows them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dltrain.launcher.chaos import machines
from dltrain.launcher.chaos.machines import Machine
from launching import wait_for

_SBIN = "/usr/sbin:/sbin"


def why_not() -> str:
    """What is missing here; empty where nothing is."""
    path = f"{os.environ['PATH']}:{_SBIN}"
    missing = [name for name in ("ssh", "sshd", "ssh-keygen") if shutil.which(name, path=path) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: openssh-server)"
    return "needs root, for sshd" if os.geteuid() else machines.why_not()


@dataclass(frozen=True)
class SshHosts:
    """Machines with an sshd. ``environ`` has a path whose ``ssh`` reaches them by name."""

    machines: Sequence[Machine]
    environ: dict[str, str]

    def processes(self) -> list[str]:
        """Command lines of what runs on them, but for sshd's own."""
        lines: list[str] = []
        for pid in (pid for machine in self.machines for pid in machine.processes()):
            try:
                lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return [line for line in lines if line and not line.startswith("sshd:") and "/sshd " not in line]


@contextmanager
def ssh_hosts(count: int) -> Iterator[SshHosts]:
    """``count`` machines m0, m1, … with an sshd each, which let this user in with a key made for it."""
    folder = Path(tempfile.mkdtemp(prefix="sh", dir="/tmp"))
    try:
        with ExitStack() as stack:
            hosts = stack.enter_context(machines.machines(count))
            for name in ("host", "user"):
                key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
                subprocess.run(key, check=True, stdin=subprocess.DEVNULL)
            Path("/run/sshd").mkdir(exist_ok=True)
            for host in hosts:
                stack.enter_context(_sshd(host, folder))
            yield SshHosts(hosts, {"PATH": f"{_client(folder, hosts)}:{os.environ['PATH']}"})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _client(folder: Path, hosts: Sequence[Machine]) -> Path:
    """A folder with an ``ssh`` that takes the configuration which others have in their home."""
    common = f"IdentityFile {folder}/user\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    text = "".join(f"Host {host.name}\nHostname {host.address}\n" for host in hosts) + f"Host *\n{common}"
    (folder / "config").write_text(text, encoding="utf-8")
    wrapper = folder / "bin/ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    return wrapper.parent


@contextmanager
def _sshd(host: Machine, folder: Path) -> Iterator[None]:
    options = {
        "HostKey": f"{folder}/host",
        "AuthorizedKeysFile": f"{folder}/user.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "PidFile": f"{folder}/{host.name}.pid",
        "ListenAddress": host.address,
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    sshd = str(shutil.which("sshd", path=f"{os.environ['PATH']}:{_SBIN}"))
    with (folder / f"{host.name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*host.prefix, sshd, "-D", "-e", "-f", "/dev/null", *flags], stdin=subprocess.DEVNULL, stderr=log
        )
    try:
        wait_for((folder / f"{host.name}.pid").exists, what=f"sshd on {host.name}")
        yield
    finally:
        process.terminate()
        process.wait()
