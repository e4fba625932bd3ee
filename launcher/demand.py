"""What a run asks of a cluster: ``nproc_per_node`` and ``placement`` settled against the machines that there are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.errors import JobError, Problem
from ..core.job import Resources
from .machine import usable_cpus, visible_gpus

#: A machine's resources as Ray counts them: "CPU" and "GPU", where it has any.
Machine = Mapping[str, float]


@dataclass(frozen=True)
class Demand:
    """What a run asks for.

    Attributes:
        nodes: number of nodes that train.
        ranks: ranks per node.
        cpus: CPUs to reserve per node.
        gpus: GPUs to reserve per node: one for each rank, or none.
        spread: whether each node gets a machine of its own.
        spares: nodes beside them that wait to take the place of lost ones.
    """

    nodes: int
    ranks: int
    cpus: int
    gpus: int
    spread: bool
    spares: int = 0

    @property
    def places(self) -> int:
        """Number of nodes to place."""
        return self.nodes + self.spares

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks

    @property
    def bundle(self) -> dict[str, float]:
        """A node's share in Ray's words."""
        return {"CPU": float(self.cpus), **({"GPU": float(self.gpus)} if self.gpus else {})}


def demand_here(resources: Resources, spares: int = 0) -> Demand:
    """What to ask of an embedded cluster. It counts as many CPUs as it is asked for; GPUs it cannot invent.

    Raises:
        JobError: it asks for more GPUs or machines than there are.
    """
    here = {"CPU": float(usable_cpus()), "GPU": float(len(visible_gpus()))}
    if resources.placement == "spread" and resources.nodes + spares > 1:
        what = f"this is one machine, and {resources.nodes} nodes are to be on a machine of their own each"
        raise JobError(Problem(what, "resources.placement", "--address joins a cluster of several"))
    demand = _demand(resources, [here], spread=False, spares=spares)
    if demand.gpus * demand.places > here["GPU"]:
        what = f"{demand.places} × {demand.ranks} ranks take a GPU each, and this machine has {here['GPU']:g}"
        raise JobError(Problem(what, "resources.nproc_per_node", "CUDA_VISIBLE_DEVICES= hides them and trains on CPUs"))
    return demand


def demand_on(
    resources: Resources,
    machines: Sequence[Machine],
    spares: int = 0,
    sizes: Callable[[int], Sequence[int]] = lambda ranks: (),
) -> Demand:
    """What to ask of an existing cluster.

    Args:
        sizes: from the ranks of a node to the numbers of nodes that the run may begin with where there are too few.

    Raises:
        JobError: the cluster can never hold it, whether or not it is busy now.
    """
    spread = resources.placement != "pack"
    try:
        demand = _demand(resources, machines, spread=spread, spares=spares)
        fit = _room(machines, demand.bundle, spread=spread)
        if fit < demand.places:
            raise _no_room(demand, machines, fit)
    except JobError:
        for nodes in range(resources.nodes, 0, -1):
            with contextlib.suppress(JobError):
                smaller = _demand(resources.model_copy(update={"nodes": nodes}), machines, spread=spread, spares=0)
                left = _room(machines, smaller.bundle, spread=spread) - nodes
                if left >= 0 and nodes in sizes(smaller.ranks):
                    return replace(smaller, spares=min(spares, left))
        raise
    return demand


def _no_room(demand: Demand, machines: Sequence[Machine], fit: int) -> JobError:
    what = (
        f"the cluster has room for {fit} of {demand.places} nodes of {words(demand.bundle)}"
        f" (machines: {'; '.join(words(machine) for machine in machines)})"
    )
    hint = "fewer --nodes, a smaller --nproc-per-node"
    if demand.spread and _room(machines, demand.bundle, spread=False) >= demand.places:
        hint = "--placement pack lets logical nodes share a machine"
    return JobError(Problem(what, "resources.nodes", hint))


def words(resources: Machine) -> str:
    """``"4 CPU, 1 GPU"``."""
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)) or "nothing"


def _demand(resources: Resources, machines: Sequence[Machine], *, spread: bool, spares: int) -> Demand:
    """``nproc_per_node`` in numbers. Its words mean what torchrun means, but for logical nodes that share a machine."""
    nodes = resources.nodes + spares
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
    return Demand(resources.nodes, ranks, ranks * (resources.cpus_per_rank or 1), gpus, spread, spares)


def _most_per_node(name: str, machines: Sequence[Machine], *, nodes: int, spread: bool) -> int:
    """The largest whole amount of the resource ``name`` that each of ``nodes`` nodes can have."""
    largest = max((int(machine.get(name, 0)) for machine in machines), default=0)
    amounts = range(largest, 0, -1)
    return next((n for n in amounts if _room(machines, {name: float(n)}, spread=spread) >= nodes), 0)


def _room(machines: Sequence[Machine], need: Machine, *, spread: bool) -> int:
    """How many nodes that ``need`` so much each the machines have room for."""
    fits = [min(int(machine.get(name, 0) // amount) for name, amount in need.items()) for machine in machines]
    return sum(1 for count in fits if count) if spread else sum(fits)
