"""What a machine offers its ranks: network interfaces, GPUs, cores, and the environment they start in."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.errors import JobError, Problem, did_you_mean
from .messages import NodeInfo

#: Variables that describe a machine or a session on it: ranks keep the node's own. (Prefixes end with an underscore.)
_MACHINE = (
    *("PATH", "HOME", "TMPDIR", "TMP", "TEMP", "LD_LIBRARY_PATH", "LD_PRELOAD", "HOSTNAME", "PWD", "OLDPWD", "SHLVL"),
    *("USER", "LOGNAME", "SHELL", "TERM", "DISPLAY", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES", "_"),
    *("XDG_", "SSH_", "SLURM_", "CONDA_", "NVIDIA_", "KUBERNETES_", "DBUS_"),
)
_MACHINE_PREFIXES = tuple(name for name in _MACHINE if name.endswith("_") and name != "_")


def describe_machine(
    node: int, interface: str | None, *, address: str, ray_node: str, versions: Mapping[str, str]
) -> NodeInfo:
    """This machine, as the agent of ``node`` describes it."""
    from .. import __version__

    cores = tuple(sorted(os.sched_getaffinity(0)))
    return NodeInfo(
        node=node,
        hostname=socket.gethostname(),
        address=address,
        interface=interface or interface_of(address),
        ray_node=ray_node,
        pid=os.getpid(),
        cores=cores,
        cpus=usable_cpus(),
        numa=tuple(tuple(group) for group in numa_nodes(cores)),
        gpus=visible_gpus(),
        versions={"dltrain": __version__, "python": platform.python_version(), **versions},
    )


def rank_environment(launch: Mapping[str, str], node: Mapping[str, str], *, same_machine: bool) -> dict[str, str]:
    """The environment that ranks of a node start from.

    On the launching machine it is the launch command's. On another it is the node's, with the launch command's
    variables over it, except those that describe a machine (PATH, HOME, SLURM_*, …). Ray's own are left out of both.
    """
    merged = dict(launch) if same_machine else {**node, **{k: v for k, v in launch.items() if not _of_machine(k)}}
    merged = {k: v for k, v in merged.items() if not k.startswith("RAY_")}
    if launch.get("CUDA_VISIBLE_DEVICES") == "":  # hidden from every rank
        merged["CUDA_VISIBLE_DEVICES"] = ""
    elif "CUDA_VISIBLE_DEVICES" in node and visible_gpus(node):  # Ray gave this node its GPUs
        merged["CUDA_VISIBLE_DEVICES"] = node["CUDA_VISIBLE_DEVICES"]
    return merged


def _of_machine(name: str) -> bool:
    return name in _MACHINE or name.startswith(_MACHINE_PREFIXES)


def visible_gpus(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Identifiers of the GPUs that this process may use, without touching them."""
    environ = os.environ if environ is None else environ
    if "CUDA_VISIBLE_DEVICES" in environ:
        return tuple(gpu for gpu in environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip())
    return tuple(str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*")))


def interfaces() -> dict[str, str]:
    """IPv4 address by name of each network interface that has one (netdevice(7), SIOCGIFADDR)."""
    import fcntl

    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_address(name: str) -> str:
    """The IPv4 address of the interface ``name``.

    Raises:
        JobError: this machine has none of that name with an address.
    """
    known = interfaces()
    if name not in known:
        what = f"{socket.gethostname()} has no network interface {name!r} with an IPv4 address"
        raise JobError(Problem(what, "resources.network_interface", did_you_mean(name, known)))
    return known[name]


def interface_of(address: str) -> str | None:
    """Name of the interface that has ``address``."""
    return next((name for name, known in interfaces().items() if known == address), None)


def usable_cpus(group: Path = Path("/sys/fs/cgroup")) -> int:
    """How many cores this process may keep busy: those it may run on, or fewer where its control group has a quota.

    ``group`` is the folder of the control group, as a container sees its own (version 2).
    """
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))  # int("max") raises: no quota
    return cores


def numa_nodes(cores: Sequence[int]) -> list[list[int]]:
    """``cores`` grouped by NUMA node, in order of nodes; one group where the kernel tells of none."""
    groups: list[list[int]] = []
    for path in sorted(Path("/sys/devices/system/node").glob("node[0-9]*"), key=lambda p: int(p.name[4:])):
        members = _parse_cpu_list((path / "cpulist").read_text().strip())
        group = [core for core in cores if core in members]
        if group:
            groups.append(group)
    return groups or [list(cores)]


def _parse_cpu_list(text: str) -> set[int]:
    members: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        members.update(range(int(first), int(last or first) + 1))
    return members


def share_cores(groups: Sequence[Sequence[int]], ranks: int) -> list[tuple[int, ...]]:
    """The cores that each of ``ranks`` ranks of a machine may run on: those of one NUMA node.

    Ranks are dealt to NUMA nodes in order, as GPUs are numbered. On a machine with one NUMA node, or with fewer ranks
    than NUMA nodes, nobody is pinned (empty tuples).
    """
    if len(groups) < 2 or ranks < len(groups):
        return [()] * ranks
    return [tuple(groups[rank * len(groups) // ranks]) for rank in range(ranks)]
