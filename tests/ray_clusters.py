"""Real Ray clusters beside the tests, from ``ray start``. They end without ``ray stop``, which stops all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dltrain.launcher.chaos.machines import Machine
from launching import BIN, Sandbox, wait_for


@dataclass(frozen=True)
class RayCluster:
    """A cluster. ``environ`` is what a launch needs to be let in."""

    address: str
    box: Sandbox
    environ: dict[str, str]

    def agents(self) -> list[str]:
        """Node agents of launches that are still there."""
        return [line for line in self.box.processes().values() if line.startswith("ray::NodeAgent")]


@contextmanager
def ray_head(folder: Path, *resources: str, **environ: str) -> Iterator[RayCluster]:
    """A cluster of one node with ``resources`` (options of ``ray start``); ``environ`` says its RAY_AUTH_MODE."""
    gcs, client, agent = free_ports(3)
    box = Sandbox(folder)
    ports = (f"--port={gcs}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}")
    try:
        with _node(box, "head", ("--head", "--include-dashboard=false", *ports, *resources), environ):
            yield RayCluster(f"127.0.0.1:{gcs}", box, environ)
    finally:
        box.close()


@contextmanager
def ray_on(machines: Sequence[Machine], folder: Path, *resources: str) -> Iterator[RayCluster]:
    """A cluster over machines, each with ``resources``."""
    environ = {"RAY_AUTH_MODE": "disabled"}
    box = Sandbox(folder)
    head = f"{machines[0].address}:6379"
    try:
        with ExitStack() as stack:
            for machine in machines:
                first = machine is machines[0]
                role = ("--head", "--include-dashboard=false", "--port=6379") if first else (f"--address={head}",)
                options = (*role, f"--node-ip-address={machine.address}", *resources)
                stack.enter_context(_node(box, machine.name, options, environ, prefix=machine.prefix))
            yield RayCluster(head, box, environ)
    finally:
        box.close()


@contextmanager
def _node(
    box: Sandbox, name: str, options: Sequence[str], environ: dict[str, str], *, prefix: Sequence[str] = ()
) -> Iterator[None]:
    """``ray start --block``, up while the block runs."""
    common = ("--block", "--disable-usage-stats", "--object-store-memory=80000000")
    temporary = (f"--temp-dir={box.temporary}",) if "--head" in options else ()
    log = box.folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*prefix, BIN / "ray", "start", *common, *temporary, *options],
            env=box.environ | environ,
            cwd=box.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def up() -> bool:
        assert process.poll() is None, log.read_text()
        return "Ray runtime started" in log.read_text()

    try:
        wait_for(up, what=f"ray start: {name}", timeout=120)
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# Above those that Ray gives its workers and below those that the kernel gives; each process begins to look elsewhere.
_PORTS = iter(range(20000 + 97 * os.getpid() % 10000, 32000))


def free_ports(count: int) -> list[int]:
    """Ports that nobody has. None is given twice: who asked for one may not have taken it yet."""
    return list(islice(filter(_is_free, _PORTS), count))


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("", port))
        except OSError:
            return False
    return True
