"""What a run asks of a cluster: ``nproc_per_node`` and ``placement`` settled against the machines that there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import JobError, Problem
from ..core.job import Resources
from .machine import usable_cpus, visible_gpus

#: A machine's resources as Ray counts them: "CPU" and "GPU", where it has any.
Machine = Mapping[str, float]


@dataclass(frozen=True)
class Demand:
    """What a run asks for.

    Attributes:
        nodes: number of nodes.
        ranks: ranks per node.
        cpus: CPUs to reserve per node.
        gpus: GPUs to reserve per node: one for each rank, or none.
        spread: whether each node gets a machine of its own.
    """

    nodes: int
    ranks: int
    cpus: int
    gpus: int
    spread: bool

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks

    @property
    def bundle(self) -> dict[str, float]:
        """A node's share in Ray's words."""
        return {"CPU": float(self.cpus), **({"GPU": float(self.gpus)} if self.gpus else {})}


def demand_here(resources: Resources) -> Demand:
    """What to ask of an embedded cluster. It counts as many CPUs as it is asked for; GPUs it cannot invent.

    Raises:
        JobError: it asks for more GPUs or machines than there are.
    """
    here = {"CPU": float(usable_cpus()), "GPU": float(len(visible_gpus()))}
    if resources.placement == "spread" and resources.nodes > 1:
        what = f"this is one machine, and {resources.nodes} nodes are to be on a machine of their own each"
        raise JobError(Problem(what, "resources.placement", "--address joins a cluster of several"))
    demand = _demand(resources, [here], spread=False)
    if demand.gpus * demand.nodes > here["GPU"]:
        what = f"{demand.nodes} × {demand.ranks} ranks take a GPU each, and this machine has {here['GPU']:g}"
        raise JobError(Problem(what, "resources.nproc_per_node", "CUDA_VISIBLE_DEVICES= hides them and trains on CPUs"))
    return demand


def demand_on(resources: Resources, machines: Sequence[Machine]) -> Demand:
    """What to ask of an existing cluster.

    Raises:
        JobError: the cluster can never hold it, whether or not it is busy now.
    """
    demand = _demand(resources, machines, spread=resources.placement != "pack")
    fit = _room(machines, demand.bundle, spread=demand.spread)
    if fit >= demand.nodes:
        return demand
    what = (
        f"the cluster has room for {fit} of {demand.nodes} nodes of {words(demand.bundle)}"
        f" (machines: {'; '.join(words(machine) for machine in machines)})"
    )
    hint = "fewer --nodes, a smaller --nproc-per-node"
    if demand.spread and _room(machines, demand.bundle, spread=False) >= demand.nodes:
        hint = "--placement pack lets logical nodes share a machine"
    raise JobError(Problem(what, "resources.nodes", hint))


def words(resources: Machine) -> str:
    """``"4 CPU, 1 GPU"``."""
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)) or "nothing"


def _demand(resources: Resources, machines: Sequence[Machine], *, spread: bool) -> Demand:
    """``nproc_per_node`` in numbers. Its words mean what torchrun means, but for logical nodes that share a machine."""
    nodes = resources.nodes
    gpus = _most_per_node("GPU", machines, nodes=nodes, spread=spread)
    match resources.nproc_per_node:
        case "cpu":
            ranks, gpus = max(1, _most_per_node("CPU", machines, nodes=nodes, spread=spread)), 0
        case "gpu" if not gpus:
            what = f"there are no GPUs for {nodes} nodes"
            raise JobError(Problem(what, "resources.nproc_per_node", "give a number"))
        case "gpu" | "auto":
            ranks = gpus or 1
        case number:
            ranks = number
            gpus = number if any(machine.get("GPU", 0) >= 1 for machine in machines) else 0
    return Demand(nodes, ranks, ranks * (resources.cpus_per_rank or 1), gpus, spread)


def _most_per_node(name: str, machines: Sequence[Machine], *, nodes: int, spread: bool) -> int:
    """The largest whole amount of the resource ``name`` that each of ``nodes`` nodes can have."""
    largest = max((int(machine.get(name, 0)) for machine in machines), default=0)
    amounts = range(largest, 0, -1)
    return next((n for n in amounts if _room(machines, {name: float(n)}, spread=spread) >= nodes), 0)


def _room(machines: Sequence[Machine], need: Machine, *, spread: bool) -> int:
    """How many nodes that ``need`` so much each the machines have room for."""
    fits = [min(int(machine.get(name, 0) // amount) for name, amount in need.items()) for machine in machines]
    return sum(1 for count in fits if count) if spread else sum(fits)
