"""Look at every node of a cluster, and at what joins them, before hours of training depend on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import DltrainError, Interrupted, JobError, Problem, RunFailed
from ..core.formats import is_url
from ..core.job import CheckpointSpec, Job, Resources, TrackingSpec
from ..tracking.wandb_mode import api_key_present, resolve_mode
from ..tracking.wandb_reach import why_unreached
from .cluster import Cluster, ClusterError
from .demand import Demand, Machine, demand_here
from .diagnosis import Asked, Finding, Link, Measured, diagnose, slower
from .errand import Outcome
from .generation import Program, plan_generation
from .host import HostError
from .interrupt import StopRequests
from .messages import NodeInfo
from .session import Options, Session

_WAIT = 10.0  # seconds that nodes wait for each other
_LONGEST = 120.0  # seconds that measuring may take, however many nodes
_EXAMINE = 30.0
_AGAIN = 2  # more times that all is measured before a node is called sick: it may have been busy for a moment
_FEW = 3  # other nodes that a launch has each node measured against


@dataclass(frozen=True)
class Health:
    """What was found.

    Attributes:
        tracker: where W&B was tried: an error in a few words, empty if it answers; None where it was not tried.
    """

    nodes: Sequence[NodeInfo]
    asked: Mapping[int, Asked]
    measured: Measured
    findings: Sequence[Finding]
    tracker: str | None = None

    @property
    def sick(self) -> list[Finding]:
        """What would make training fail or slow."""
        return [finding for finding in self.findings if finding.sick]


def examine_cluster(
    job: Job, *, address: str | None, nodes: int | None, runs: Path, phase: Callable[[str], None]
) -> Health:
    """Look at a cluster's nodes.

    Args:
        job: whose storage, tracker and network interface are tried.
        address: of an existing Ray cluster; None looks at this machine through an embedded one.
        nodes: how many; all of a cluster's machines, or one here, if not given.
        runs: parent of the run directories.
        phase: told what is waited for.

    Raises:
        JobError: there is no such cluster, or it has fewer machines.
        RunFailed: its nodes could not be had.
    """
    recovery, options = job.recovery, Options(address=address)
    resources = Resources(nodes=nodes or 1, nproc_per_node=1, network_interface=job.resources.network_interface)
    demand = demand_here(resources) if address is None else None

    def ask(resources: Resources, machines: Sequence[Machine]) -> Demand:
        return _one_each(nodes, machines)

    try:
        with (
            StopRequests() as stop,
            Session(options, resources, recovery, stop, demand, ask=ask, looks=True) as session,
        ):
            session.connect(phase)
            session.place(phase)
            return look(
                session.cluster, checkpoint=job.checkpoint, tracking=job.tracking, runs=runs, phase=phase, pairings=None
            )
    except (ClusterError, HostError) as error:
        raise RunFailed(str(error)) from error


def _one_each(nodes: int | None, machines: Sequence[Machine]) -> Demand:
    """A node on each of the machines, or on ``nodes`` of them."""
    able = sum(1 for machine in machines if machine.get("CPU", 0) >= 1)
    if able < (nodes or 1):
        raise JobError(Problem(f"the cluster has {able} machines with a CPU, not {nodes or 1}", "--nodes"))
    return Demand(nodes or able, 1, 1, 0, spread=True)


def look(
    cluster: Cluster,
    *,
    checkpoint: CheckpointSpec,
    tracking: TrackingSpec,
    runs: Path,
    phase: Callable[[str], None],
    pairings: int | None,
) -> Health:
    """Look at the nodes of a placed cluster.

    Args:
        cluster: it has agents.
        checkpoint: the storage that every node tries to write to, if it names one.
        tracking: whether W&B is tried.
        runs: parent of the run directories.
        phase: told what is waited for.
        pairings: how many other nodes each is measured against; None for all.

    Raises:
        ClusterError: a node was lost meanwhile.
        Interrupted: a stop was asked for.
        JobError: W&B is to be online, and there is no key.
    """
    phase("looking at the nodes")
    asked = _examine(cluster, checkpoint, runs)
    phase("measuring what joins the nodes")
    measured = _measure(cluster, pairings)
    for _ in range(_AGAIN):
        if not measured.failed and not slower(cluster.nodes, measured):
            break
        phase("measuring again, as something was slow or failed")
        measured = measured.or_better(_measure(cluster, pairings))
    tracker = _try_tracker(tracking)
    findings = diagnose(cluster.nodes, asked, measured)
    if tracker:
        findings.append(
            Finding(False, (), f"Weights & Biases: {tracker}", "metrics are kept, and sent when it is back")
        )
    return Health(cluster.nodes, asked, measured, findings, tracker)


def check_first(
    cluster: Cluster, *, checkpoint: CheckpointSpec, tracking: TrackingSpec, runs: Path, phase: Callable[[str], None]
) -> None:
    """The quick part, before a launch: every node's state, and links to a few others.

    Raises:
        JobError: a node is sick.
        ClusterError: a node was lost meanwhile.
    """
    health = look(cluster, checkpoint=checkpoint, tracking=tracking, runs=runs, phase=phase, pairings=_FEW)
    if health.sick:
        sick = [Problem(describe(finding, health.nodes), "--preflight", finding.hint) for finding in health.sick]
        raise JobError(*sick)


def describe(finding: Finding, nodes: Sequence[NodeInfo]) -> str:
    """A finding in words, with the names of its nodes."""
    names = {node.node: f"node {node.node} ({node.hostname})" for node in nodes}
    who = " and ".join(names[node] for node in finding.nodes)
    return f"{who}: {finding.what}" if who else finding.what


def _examine(cluster: Cluster, checkpoint: CheckpointSpec, runs: Path) -> dict[int, Asked]:
    url = checkpoint.to or ""
    options = dict(checkpoint.options) if is_url(url) else {}
    asked: dict[int, Asked] = {}
    for node, agent in enumerate(cluster.agents):  # one after the other, so that clocks can be compared
        begin = time.time()
        ref = agent.examine.remote(str(runs.absolute()), url, options)
        vitals = cluster.gather([ref], waiting_for=f"looking at node {node}", timeout=_EXAMINE)[0]
        end = time.time()
        asked[node] = Asked(vitals, ahead=vitals.at - end, within=end - begin)
    return asked


def _measure(cluster: Cluster, pairings: int | None) -> Measured:
    nodes = cluster.nodes
    one_machine = len({node.ray_node for node in nodes}) == 1
    addresses = ["127.0.0.1"] * len(nodes) if one_machine else [node.address for node in nodes]
    store = cluster.agents[0].open_store.remote(addresses[0], 0, _WAIT)
    port = cluster.gather([store], waiting_for=f"a rendezvous store on {addresses[0]}")[0]
    body = {"addresses": addresses, "timeout": _WAIT, "pairings": pairings}
    program = Program(kind="probe", body=body, cwd="/", run_id="doctor")
    plans = plan_generation(
        program,
        nodes,
        nproc=1,
        generation=0,
        restart=0,
        master=(addresses[0], port),
        logs=Path("/"),
        environ=dict(os.environ),
    )
    limit = min(_LONGEST, 3 * _WAIT + len(nodes))
    pairs = zip(cluster.agents, plans, strict=True)
    refs = [agent.errand.remote(plan[0].child, timeout=limit) for agent, plan in pairs]
    said: dict[int, dict[str, Any]] = {}
    failed: dict[int, str] = {}
    for node, ref in enumerate(refs):
        try:
            outcome: Outcome = cluster.gather([ref], waiting_for="measuring", timeout=limit + _WAIT)[0]
        except Interrupted:
            raise
        except DltrainError as error:
            failed[node] = str(error)
            continue
        if outcome.messages:
            said[node] = outcome.messages[0]
        else:
            last = outcome.output.splitlines()[-1:]
            failed[node] = f"the measuring process {outcome}{': ' + last[0] if last else ''}"
    cluster.gather([cluster.agents[0].close_stores.remote()], waiting_for="closing the rendezvous store")
    return measured_of(said, failed)


def measured_of(said: Mapping[int, Mapping[str, Any]], failed: Mapping[int, str]) -> Measured:
    """What the nodes measured, put together: of a pair's two directions the worse."""
    failed = dict(failed)
    for node, words in said.items():
        if node in words["left_out"]:
            unreached = [other for other, theirs in said.items() if node in theirs["unreached"]]
            cannot = [*words["unreached"]]
            failed[node] = "no connection " + " and ".join(
                filter(None, [_list("to it from", unreached), _list("from it to", cannot)])
            )
    links: list[Link] = []
    for one, words in said.items():
        for name, there in words["links"].items():
            other = int(name)
            back = said.get(other, {}).get("links", {}).get(str(one), there)
            if one < other:
                latency = max(there["latency"], back["latency"])
                links.append(Link(one, other, latency, min(there["bandwidth"], back["bandwidth"])))
    flops = {node: float(words["flops"]) for node, words in said.items()}
    reduced = [float(words["all_reduce"]) for words in said.values() if words["all_reduce"]]
    return Measured(tuple(links), min(reduced, default=0.0), flops, failed)


def _list(words: str, nodes: Sequence[int]) -> str:
    return f"{words} {'nodes' if len(nodes) > 1 else 'node'} {', '.join(map(str, nodes))}" if nodes else ""


def _try_tracker(tracking: TrackingSpec) -> str | None:
    mode = resolve_mode(tracking.wandb.mode, api_key_present(), env_mode=os.environ.get("WANDB_MODE", ""))
    return why_unreached(os.environ) if mode == "online" else None
