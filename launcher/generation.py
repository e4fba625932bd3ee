"""One generation of ranks: from a request and its nodes to their numbers, environment, cores and log folders."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.lease import of_generation
from ..core.errors import Problem
from .failure import Casualty
from .machine import share_cores
from .messages import ChildKind, ChildSpec, NodeInfo, Point, RankPlan
from .policy import Status
from .stall import Standstill

#: Names of the variables by which gloo and NCCL choose a network interface.
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass
class Generation:
    """What is known of the ranks that run now."""

    number: int
    world: int
    nproc: int
    started: set[int] = field(default_factory=set[int])
    done: set[int] = field(default_factory=set[int])
    ended: set[int] = field(default_factory=set[int])
    closed: set[int] = field(default_factory=set[int])
    said: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    casualties: dict[int, Casualty] = field(default_factory=dict[int, Casualty])
    preempted: dict[int, str] = field(default_factory=dict[int, str])
    """Ranks that somebody else wants to end, with the signal that told them."""
    refused: list[Problem] = field(default_factory=list[Problem])
    lost: dict[int, str] = field(default_factory=dict[int, str])
    lost_at: float = 0.0
    """Unix time in seconds at which the first lost node was noticed."""
    step: int = -1
    """The newest step that earlier ones had got to as it was started, or that it goes on from."""
    since: float = field(default_factory=time.monotonic)
    regrouping: bool = False
    """Its ranks were asked to save and end, to go on with more nodes."""
    exited: set[int] = field(default_factory=set[int])
    standstill: Standstill | None = None
    point: Point | None = None
    """The snapshot in memory that it goes on from."""
    memory: str = ""
    """Where that lies, in words."""
    begun: bool = False
    """Its ranks have what they go on from."""
    ending: bool = False
    """The controller is ending it: exits from now on are its own doing."""

    def present(self) -> set[int]:
        """Ranks that may still say something: not closed, and not on a lost node."""
        return {r for r in range(self.world) if r not in self.closed and r // self.nproc not in self.lost}

    def reached(self, *told: int) -> int:
        """The newest step that it or an earlier one has got to: one ``told``, or where its ranks ended or stood."""
        stood = [place.step for place in self.standstill.places] if self.standstill else []
        return max(self.step, *told, *stood, *(casualty.failure.step for casualty in self.casualties.values()))

    def status(self, *, broken: str, complete: bool, stop_asked: bool, fruitful: bool) -> Status:
        """What the policy is to know of it, and of what only the caller knows."""
        return Status(
            world=self.world,
            ended=len(self.ended),
            failures=tuple(casualty.failure for casualty in self.casualties.values()),
            lost_nodes={node: what.splitlines()[0].rstrip(":") for node, what in self.lost.items()},
            broken=broken,
            complete=complete,
            stop_asked=stop_asked,
            preempted=self.preempted,
            stall=self.standstill.stall if self.standstill else None,
            regroup=self.regrouping,
            fruitful=fruitful,
        )

    def lose(self, lost: Mapping[int, str]) -> None:
        """Note that nodes are lost, and why; what was known of one before stays."""
        if lost and not self.lost:
            self.lost_at = time.time()
        self.lost = {**lost, **self.lost}

    def alive(self) -> set[int]:
        """Ranks that still run, as far as is known."""
        return self.present() - self.exited

    def told(self) -> bool:
        """Whether one of them has told what it failed with, and that is not another's failure."""
        return any(not self.said[rank]["witness"] for rank in self.alive() & self.said.keys())


@dataclass(frozen=True)
class Program:
    """What every rank of a run executes."""

    kind: ChildKind
    body: dict[str, Any]
    cwd: str
    run_id: str
    role: str = "default"
    fresh: bool = False
    max_restarts: int = 0
    cpus_per_rank: int | None = None
    remedies: tuple[str, ...] = ()
    """What would let ranks hold less memory."""

    def body_of(self, generation: int) -> dict[str, Any]:
        """The entry's arguments for the ranks of a generation: their lease is good until the next one is fenced off."""
        if self.kind != "worker":
            return self.body
        return self.body | {"lease": of_generation(self.body["lease"], generation), "generation": generation}


def plan_generation(
    program: Program,
    nodes: Sequence[NodeInfo],
    *,
    nproc: int,
    generation: int,
    restart: int,
    master: tuple[str, int],
    logs: Path,
    environ: dict[str, str],
    facts: Mapping[str, Any] | None = None,
) -> list[list[RankPlan]]:
    """The ranks of each node. Ranks count up node by node, as torchrun numbers them.

    Args:
        program: what to run.
        nodes: the nodes, in order of their rank.
        nproc: ranks per node.
        generation: how often the run's ranks have been started before, by earlier launches too.
        restart: how often this launch has started them before.
        master: address and port of the generation's rendezvous store.
        logs: folder for the ranks' logs; theirs are ``attempt-<generation>/rank-<rank>``.
        environ: the launching command's environment; what the user set there wins over our defaults.
        facts: what ranks are told of this generation, beside what all generations are told.
    """
    loopback = len({node.ray_node for node in nodes}) == 1
    placement = _placement(nodes, nproc, program.cpus_per_rank)
    plans: list[list[RankPlan]] = []
    for index, node in enumerate(nodes):
        defaults = _interface_defaults(node, loopback=loopback)
        plans.append([])
        for local in range(nproc):
            rank = index * nproc + local
            threads, cpus = placement[rank]
            env = {
                "OMP_NUM_THREADS": str(threads),
                **defaults,
                **{name: environ[name] for name in ("OMP_NUM_THREADS", *_INTERFACE_VARIABLES) if name in environ},
                **_torchrun_environment(program, len(nodes), nproc, index, local, restart, master),
            }
            child = ChildSpec(
                kind=program.kind,
                label=f"dltrain-rank{rank}",
                env=env,
                cwd=program.cwd,
                threads=int(env["OMP_NUM_THREADS"]) if env["OMP_NUM_THREADS"].isdecimal() else None,
                cpus=cpus,
                fresh=program.fresh,
                body={**program.body_of(generation), **(facts or {})},
            )
            folder = logs / f"attempt-{generation}" / f"rank-{rank}"
            plans[-1].append(RankPlan(rank, local, child, str(folder)))
    return plans


def _torchrun_environment(
    program: Program, nodes: int, nproc: int, node: int, local: int, restart: int, master: tuple[str, int]
) -> dict[str, str]:
    """The variables that torchrun sets (torch.distributed.run, "Environment Variables")."""
    rank = node * nproc + local
    values: dict[str, str | int] = {
        "LOCAL_RANK": local,
        "RANK": rank,
        "GROUP_RANK": node,
        "ROLE_RANK": rank,
        "ROLE_NAME": program.role,
        "LOCAL_WORLD_SIZE": nproc,
        "WORLD_SIZE": nodes * nproc,
        "GROUP_WORLD_SIZE": nodes,
        "ROLE_WORLD_SIZE": nodes * nproc,
        "MASTER_ADDR": master[0],
        "MASTER_PORT": master[1],
        "TORCHELASTIC_RESTART_COUNT": restart,
        "TORCHELASTIC_MAX_RESTARTS": program.max_restarts,
        "TORCHELASTIC_RUN_ID": program.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    return {name: str(value) for name, value in values.items()}


def _interface_defaults(node: NodeInfo, *, loopback: bool) -> dict[str, str]:
    """On one machine ranks talk over loopback; on several, over the interface that has the node's address."""
    name = "lo" if loopback else node.interface
    return dict.fromkeys(_INTERFACE_VARIABLES, name) if name else {}


def _placement(nodes: Sequence[NodeInfo], nproc: int, cpus: int | None) -> dict[int, tuple[int, tuple[int, ...]]]:
    """Threads and cores of each rank: the cores of a machine shared by all ranks on it, whichever logical node."""
    machines: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        machines[node.ray_node].extend(range(index * nproc, (index + 1) * nproc))
    by_machine = {node.ray_node: node for node in nodes}
    placed: dict[int, tuple[int, tuple[int, ...]]] = {}
    for machine, ranks in machines.items():
        node = by_machine[machine]
        threads = cpus or max(1, node.cpus // len(ranks))
        for rank, cores in zip(ranks, share_cores(node.numa, len(ranks)), strict=True):
            placed[rank] = (threads, cores)
    return placed
