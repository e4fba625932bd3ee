"""The process that holds the connections of a job on ssh hosts: Ray on each, the launch on the first, then their end.

What runs on a host lives no longer than its connection: the shell there reads names of signals from it for what it has
started, and takes its end for SIGTERM. So nothing stays behind when this process, or this machine, goes.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

_PREFIXES = (
    *("DLTRAIN_", "WANDB_", "NCCL_", "GLOO_", "OMP_", "TORCH_", "AWS_", "HF_", "PYTHON"),
    *("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "DS_"),  # what Accelerate and DeepSpeed read
)
_GRACE = 30.0  # seconds for Ray to end on a host
_POLL = 0.1


@dataclass(frozen=True)
class Host:
    """A host as ssh calls it, and how many ranks it takes; None says nothing of that."""

    name: str
    slots: int | None


@dataclass(frozen=True)
class Plan:
    """What is to run where.

    Attributes:
        hosts: the first is the head.
        path: folder of dltrain and Ray, on every host.
        folder: the working directory, on every host.
        launch: ``dltrain launch`` and its options, without an address.
        target: what it launches.
        log: the beginning of the paths of logs.
        cpus_per_rank: CPUs that Ray counts for each slot.
    """

    hosts: tuple[Host, ...]
    path: str
    folder: str
    launch: tuple[str, ...]
    target: tuple[str, ...]
    log: str
    cpus_per_rank: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        hosts = tuple(Host(**host) for host in data["hosts"])
        words: dict[str, Any] = {name: tuple(data[name]) for name in ("launch", "target")}
        fields: dict[str, Any] = {**data, **words, "hosts": hosts}
        return cls(**fields)

    @staticmethod
    def variables(environ: Mapping[str, str]) -> tuple[str, ...]:
        """Names of the variables that the launch gets beside those of its host."""
        return tuple(sorted(name for name in environ if name.startswith(_PREFIXES)))


def ssh(host: str) -> list[str]:
    """The command that opens a connection to a shell."""
    options = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4")
    return ["ssh", "-T", *(word for option in options for word in ("-o", option)), "--", host, "bash", "-s"]


def node_script(plan: Plan, host: Host, address: str, port: int) -> str:
    """What the shell of a host is told, to be a node of the Ray cluster; ``address`` is the head's."""
    session = f"/tmp/dltrain-{Path(plan.log).name}"  # noqa: S108  # short, since Unix socket paths hold 107 bytes
    if host == plan.hosts[0]:
        where = f"--head --port={port} --ray-client-server-port={port + 1} --include-dashboard=false "
        where += f"--temp-dir={session} --node-ip-address={address}"
    else:
        where = f'--address={address}:{port} --node-ip-address="$here"'
    ray = f"ray start --block --disable-usage-stats {where}"
    if host.slots is not None:
        ray += f" --num-cpus={host.slots * plan.cpus_per_rank}"
    return _script(
        plan,
        [
            "export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0",
            "here=$(set -- $SSH_CONNECTION; echo $3)  # the address that it was reached at",
            f"hold {ray} --object-store-memory=80000000",
            "trap '' TERM",
            "kill -TERM 0  # all of this shell's group: Ray's agents are slow to see that the rest is gone",
            "sleep 1",
            f"rm -rf {session}",
            "kill -KILL 0",
        ],
    )


def launch_script(plan: Plan, address: str, port: int) -> str:
    """What another shell of the first host is told, to wait for the cluster and launch on it."""
    gather = f"python -P -m dltrain.launcher.submit.gather {address}:{port} {len(plan.hosts)} $$"
    launch = shlex.join([*plan.launch, "--address", f"{address}:{port}", *plan.target])
    return _script(plan, [f"hold {gather} && hold {launch}"])


def _script(plan: Plan, lines: Sequence[str]) -> str:
    """Shell lines, in braces: read whole before the first is run, since what follows on the connection are signals."""
    begin = [f"export PATH={shlex.quote(plan.path)}:$PATH", f"cd {shlex.quote(plan.folder)} || exit 1"]
    return "\n".join(["{", *begin, *_HOLD, *lines, "exit $code", "}", ""])


_HOLD = r"""
exec 3<&0
hold() {
    "$@" </dev/null 3<&- &
    child=$!
    (while read -r name; do kill -"$name" "$child"; done <&3; kill -TERM "$child") 2>/dev/null &
    reader=$!
    wait "$child"
    code=$?
    kill "$reader" 2>/dev/null
    return $code
}
""".strip().splitlines()


class _Shell:
    """A connection to a shell of a host."""

    def __init__(self, host: str, script: str, secrets: Mapping[str, str], output: IO[bytes]) -> None:
        self._process = subprocess.Popen(
            ssh(host), stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in secrets.items())
        self.tell(exports + script)

    def tell(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone, which its code says
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def let_go(self) -> None:
        """Have what runs there end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def wait(self, deadline: float) -> None:
        """Wait until ``deadline`` for its end, and end the connection then."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Asked:
    """Which signals came, to be passed on."""

    def __init__(self) -> None:
        self.names: list[str] = []
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        # as SIGTERM: what a shell starts in the background ignores SIGINT until it has a handler of its own
        self.names += ["TERM"] if signum != signal.SIGTERM else ["TERM", "TERM"]


def drive(plan: Plan, environ: Mapping[str, str]) -> int:
    """Start everything, wait for the launch, end everything; the launch's exit code."""
    asked = _Asked()
    address = address_of(plan.hosts[0].name)
    port = 20000 + secrets.randbelow(5000) * 2
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    travelling = token | {name: environ[name] for name in plan.variables(environ)}
    with ExitStack() as stack:
        output = stack.enter_context(Path(f"{plan.log}-ray.log").open("ab", buffering=0))
        nodes = [_Shell(host.name, node_script(plan, host, address, port), token, output) for host in plan.hosts]
        launch = _Shell(plan.hosts[0].name, launch_script(plan, address, port), travelling, sys.stdout.buffer)
        code = _watch(plan, nodes, launch, asked)
        deadline = time.monotonic() + _GRACE
        for shell in (launch, *nodes):
            shell.let_go()
        for shell in (launch, *nodes):
            shell.wait(deadline)
    return code


def _watch(plan: Plan, nodes: Sequence[_Shell], launch: _Shell, asked: _Asked) -> int:
    """Pass signals on until the launch has ended; its code."""
    lost: set[str] = set()
    last = 0.0
    while (code := launch.code) is None:
        if asked.names and time.monotonic() - last > 0.5:  # two at once would count as one
            launch.tell(f"{asked.names.pop(0)}\n")
            last = time.monotonic()
        for host, shell in zip(plan.hosts, nodes, strict=True):
            if shell.code is not None and host.name not in lost:
                lost.add(host.name)
                _say(f"Ray on {host.name} has ended, code {shell.code}: see {plan.log}-ray.log")
                if host == plan.hosts[0]:
                    launch.tell("TERM\n")
        time.sleep(_POLL)
    return code


def address_of(host: str) -> str:
    """The IPv4 address that ssh would reach ``host`` at; the name itself where it cannot be told."""
    done = subprocess.run(["ssh", "-G", "--", host], capture_output=True, text=True, timeout=30, check=False)
    named = next((line.split()[1] for line in done.stdout.splitlines() if line.startswith("hostname ")), host)
    try:
        return socket.gethostbyname(named)
    except OSError:
        return named


def _say(text: str) -> None:
    sys.stdout.write(f"dltrain: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    import os

    the_plan = Plan.from_json(json.load(sys.stdin))
    try:
        ended = drive(the_plan, os.environ)
    except Exception as error:  # the log is read by whoever asks for it
        _say(f"{type(error).__name__}: {error}")
        ended = 1
    done_file = Path(f"{the_plan.log}.exit")
    done_file.with_suffix(".partial").write_text(f"{ended}\n", encoding="utf-8")
    done_file.with_suffix(".partial").rename(done_file)
    sys.exit(ended)
