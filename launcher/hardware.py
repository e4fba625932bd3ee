"""The machines that a job is planned for: those that options name, this one, or a cluster's."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import JobError, Problem
from ..core.gpus import GPUS, Gpu, cpu, find_gpu, recognise
from ..core.job import Job
from .demand import Demand
from .machine import usable_cpus, visible_gpus
from .messages import NodeInfo
from .vitals import Vitals

_MIB = 2**20


@dataclass(frozen=True)
class Machines:
    """Where a job is to run.

    Attributes:
        nodes: how many machines.
        per_node: ranks on each: one for each GPU.
        gpu: what each rank computes on.
        memory: bytes that each rank has.
    """

    nodes: int
    per_node: int
    gpu: Gpu
    memory: int

    @property
    def world(self) -> int:
        return self.nodes * self.per_node


def machines_for(job: Job, *, nodes: int | None, per_node: int | None, gpu: str | None, memory: int | None) -> Machines:
    """The machines that options name; what they do not say is this machine's.

    Raises:
        JobError: there is no such GPU in the table, or this machine has GPUs of a kind that must be named.
    """
    nodes = nodes or job.resources.nodes
    own = job.resources.nproc_per_node
    if per_node is None and isinstance(own, int):
        per_node = own
    if gpu is None and visible_gpus():
        raise JobError(Problem("which GPU is to be planned for?", "--gpu", "such as --gpu H100-80GB"))
    if gpu is None:
        per_node = per_node or (usable_cpus() if own == "cpu" else 1)
        ram = memory or _ram()
        device = cpu(ram, max(1, usable_cpus() // (nodes * per_node)))
        return Machines(nodes, per_node, device, ram // (nodes * per_node if memory is None else 1))
    device = find_gpu(gpu, cores=4)
    per_node = per_node or (1 if device.is_cpu else 8)
    share = device.memory // per_node if device.is_cpu else device.memory
    return Machines(nodes, per_node, device, memory or share)


def machines_of(demand: Demand, nodes: Sequence[NodeInfo], vitals: Sequence[Vitals]) -> Machines:
    """The nodes that a launch has been given; the scarcest of them speaks for all.

    Raises:
        JobError: they have GPUs, and nothing tells how large these are.
    """
    if demand.gpus:
        device = _smallest_gpu(nodes, vitals)
        return Machines(demand.nodes, demand.ranks, device, device.memory)
    together = Counter(node.ray_node for node in nodes)  # nodes that share a machine
    pairs = list(zip(nodes, vitals, strict=True))
    memory = min(state.memory // (together[node.ray_node] * demand.ranks) for node, state in pairs)
    cores = min(node.cpus // (together[node.ray_node] * demand.ranks) for node in nodes)
    return Machines(demand.nodes, demand.ranks, cpu(memory, max(1, cores)), memory)


def _smallest_gpu(nodes: Sequence[NodeInfo], vitals: Sequence[Vitals]) -> Gpu:
    found: list[Gpu] = []
    for node, state in zip(nodes, vitals, strict=True):
        told = [(gpu.name, gpu.memory * _MIB, (gpu.used or 0) * _MIB) for gpu in state.gpus if gpu.memory is not None]
        if not told:
            why = "; ".join(state.trouble) or "nvidia-smi does not say"
            what = f"how large the GPUs of node {node.node} ({node.hostname}) are is not known: {why}"
            raise JobError(Problem(what, "parallel.strategy", "name a strategy"))
        for name, memory, used in told:
            gpu = recognise(name, int(memory))
            found.append(replace(gpu, memory=min(gpu.memory, int(memory - used))))
    return min(found, key=lambda gpu: gpu.memory)


def options_of(machines: Machines) -> list[str]:
    """The options of ``dltrain plan`` that mean ``machines``."""
    words = ["--nodes", str(machines.nodes), "--gpus-per-node", str(machines.per_node)]
    if machines.gpu.name in GPUS or visible_gpus():
        words += ["--gpu", machines.gpu.name]
    return [*words, "--memory", f"{machines.memory // _MIB}MiB"]


def _ram() -> int:
    """This machine's memory, or what its control group leaves of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return whole
    return min(whole, int(limit)) if limit.isdigit() else whole
