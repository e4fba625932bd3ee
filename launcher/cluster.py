"""The Ray side of a run: an embedded cluster or an existing one, a placement group, one node agent a node."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ..core.errors import DltrainError, JobError, Problem
from . import untyped
from .agent import BEAT, NodeAgent
from .daemons import Daemons, children_lead_groups
from .demand import Demand, Machine, words
from .janitor import sweep
from .machine import interfaces
from .messages import NodeInfo
from .points import buddies

_CONNECT_TIMEOUT = 10.0
_SLICE = 0.25  # seconds of waiting between looks at whether the user wants to stop
OBJECT_STORE = 80_000_000
"""Bytes of Ray's object store; its smallest: copies of snapshots pass through it in small slices."""


class ClusterError(DltrainError):
    """The cluster could not be started, reached, or held."""


@dataclass(eq=False)
class Seat:
    """Resources that are reserved for one node, and the agent that has them, if one does."""

    group: Any
    index: int
    agent: Any = None


@dataclass(frozen=True)
class Hiring:
    """What every node agent is made with: resources, the fork server's scope and imports, the launch's environment."""

    demand: Demand
    scope: str
    environ: dict[str, str]
    preload: Sequence[str]


@dataclass
class Cluster:
    """A connection to Ray with one agent per node. Use as a context manager; leaving it gives everything back."""

    address: str | None
    """Of an existing Ray cluster ("auto", "host:port"); None: an embedded one is started."""
    timeout: float
    """Longest wait for each of Ray's answers, in seconds."""
    interrupted: Callable[[], None] = lambda: None
    """Called while waiting; raises to give up the wait."""
    agents: list[Any] = field(default_factory=list[Any])
    """Of the nodes that train, in order of their numbers; of the spare ones too until the controller begins."""
    nodes: list[NodeInfo] = field(default_factory=list[NodeInfo])
    """What the agents say of their machines."""
    folder: Path | None = None
    """The embedded cluster's temporary folder."""
    _seats: list[Seat] = field(default_factory=list[Seat])
    _hiring: Hiring | None = None
    _connected: bool = False
    _daemons: Daemons | None = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_process(self) -> None:
        """Refuse a process that is connected to another cluster than the one asked for.

        Raises:
            JobError: it is.
        """
        if "ray" not in sys.modules or not untyped.ray().is_initialized():
            return
        connected: str = untyped.ray().get_runtime_context().gcs_address
        hint = "say address='auto' to use that one, or ray.shutdown() first"
        if self.address is None:
            raise JobError(Problem(f"this process is connected to the Ray cluster at {connected}", "--address", hint))
        if self.address not in ("auto", connected):
            what = f"this process is connected to another Ray cluster than {self.address}: {connected}"
            raise JobError(Problem(what, "--address", hint))

    def connect(self, demand: Demand | None = None) -> None:
        """Join the cluster at the address, or start the embedded one, made for ``demand``, if there is none yet.

        Raises:
            ClusterError: the embedded one did not start.
            JobError: there is none at that address.
        """
        _set_ray_environment(self.address)
        if untyped.ray().is_initialized():
            return
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "dltrain"}
        self._connected = True
        _let_ray_print(False)
        if self.address is not None:
            _join(self.address, common)
        else:
            assert demand is not None
            assert self.folder is not None
            _start(demand, common, self.folder)
            self._daemons = Daemons()

    def broken(self) -> str:
        """Which of the embedded cluster's own processes has died, and how, in a few words; empty while all live."""
        return self._daemons.dead() if self._daemons else ""

    def machines(self) -> list[Machine]:
        """The resources of each living machine of the cluster, in use or not."""
        return [node["Resources"] for node in untyped.ray().nodes() if node["Alive"]]

    def place(self, demand: Demand, scope: str, environ: dict[str, str], preload: Sequence[str]) -> None:
        """Reserve the nodes and create their agents.

        Raises:
            ClusterError: there was no room within the timeout, because the cluster is busy.
        """
        from ray.util.placement_group import placement_group

        ray = untyped.ray()
        bundle = demand.bundle
        strategy = "STRICT_SPREAD" if demand.spread else "PACK"
        group = placement_group([bundle] * demand.places, strategy=strategy)
        self._hiring = Hiring(demand, scope, environ, preload)
        self._seats = [Seat(group, index) for index in range(demand.places)]
        deadline = time.monotonic() + self.timeout
        while not group.wait(_SLICE):
            self.interrupted()
            if time.monotonic() < deadline:
                continue
            raise ClusterError(
                f"the cluster did not free {demand.places} × {words(bundle)} within {self.timeout:g} s; "
                f"free now: {words(ray.available_resources())}"
            )
        self.agents = [self.hire(seat) for seat in self._seats]

    def hire(self, seat: Seat) -> Any:
        """Create an agent on a free seat."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert self._hiring is not None
        bundle = self._hiring.demand.bundle
        here = PlacementGroupSchedulingStrategy(seat.group, placement_group_bundle_index=seat.index)
        agent = untyped.ray().remote(concurrency_groups={BEAT: 1})(NodeAgent)
        options = agent.options(
            num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), max_concurrency=8, scheduling_strategy=here
        )
        number, embedded, hiring = self._seats.index(seat), self.address is None, self._hiring
        seat.agent = options.remote(number, hiring.scope, hiring.environ, embedded, hiring.preload)
        return seat.agent

    def dismiss(self, agent: Any) -> None:
        """End an agent, whatever state it is in; its ranks end with it, and its seat is free."""
        with contextlib.suppress(Exception):  # one that is gone already
            untyped.ray().kill(agent)
        for seat in self._seats:
            if seat.agent is agent:
                seat.agent = None

    def free_seats(self) -> list[tuple[Seat, str]]:
        """Seats without an agent that lie on a living machine, with Ray's name of it."""
        ray_groups: Any = importlib.import_module("ray.util.placement_group")  # its table is not typed
        alive = {node["NodeID"] for node in untyped.ray().nodes() if node["Alive"]}
        found: list[tuple[Seat, str]] = []
        for seat in self._seats:
            if seat.agent is None:
                table: dict[str, Any] = ray_groups.placement_group_table(seat.group)
                machine: str = table["bundles_to_node_id"].get(seat.index, "")
                if machine in alive and table["state"] in ("CREATED", "RESCHEDULING"):
                    found.append((seat, machine))
        return found

    def has_room(self, avoid: Collection[str]) -> bool:
        """Whether another machine could hold one more node, if what it has is not in use."""
        assert self._hiring is not None
        bundle = self._hiring.demand.bundle
        machines = [
            node["Resources"] for node in untyped.ray().nodes() if node["Alive"] and node["NodeID"] not in avoid
        ]
        return any(all(machine.get(name, 0) >= need for name, need in bundle.items()) for machine in machines)

    def ask_for_seat(self, avoid: Collection[str]) -> Seat:
        """Have Ray look for resources for one more node, on none of the machines ``avoid`` names; it may take long."""
        from ray.util.placement_group import placement_group

        assert self._hiring is not None
        selector = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"} if avoid else {}
        seat = Seat(placement_group([self._hiring.demand.bundle], bundle_label_selector=[selector]), 0)
        self._seats.append(seat)
        return seat

    def give_up(self, seat: Seat) -> None:
        """Stop looking for the resources of a seat that was asked for."""
        from ray.util.placement_group import remove_placement_group

        self._seats.remove(seat)
        with contextlib.suppress(Exception):
            remove_placement_group(seat.group)

    def number(self, nodes: Sequence[NodeInfo]) -> None:
        """Number nodes and agents as people expect: this machine's first, then by address. Ray places them anyhow."""
        here = untyped.ray().get_runtime_context().get_node_id()

        def place(node: NodeInfo) -> tuple[bool, int, int, int]:
            address = ip_address(node.address)
            return node.ray_node != here, address.version, int(address), node.node

        order = sorted(nodes, key=place)
        self.agents = [self.agents[node.node] for node in order]
        self.nodes = [replace(node, node=number) for number, node in enumerate(order)]

    def call(self, method: str, *args: Any, waiting_for: str, **kwargs: Any) -> list[Any]:
        """Call a method of every agent and wait for all answers.

        Raises:
            ClusterError: an agent died or did not answer in time; the text names node and reason.
            JobError: as the agent raised it.
        """
        refs = [getattr(agent, method).remote(*args, **kwargs) for agent in self.agents]
        return self.gather(refs, waiting_for=waiting_for)

    def gather(self, refs: Sequence[Any], *, waiting_for: str, timeout: float | None = None) -> list[Any]:
        """The agents' answers, in order of ``refs`` (one per node). Raises as :meth:`call`."""
        ray = untyped.ray()
        timeout = self.timeout + 5 if timeout is None else timeout
        deadline = time.monotonic() + timeout
        answers: list[Any] = []
        for node, ref in enumerate(refs):
            while not ray.wait([ref], timeout=_SLICE)[0]:
                self.interrupted()
                if time.monotonic() < deadline:
                    continue
                raise ClusterError(f"node {node} gave no answer within {timeout:g} s: {waiting_for}")
            try:
                answers.append(ray.get(ref))
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                if isinstance(cause, DltrainError):
                    raise cause from None
                raise ClusterError(f"node {node}: {waiting_for}: {cause}") from error
            except ray.exceptions.RayError as error:
                raise ClusterError(f"node {node} was lost: {loss_of(error)} ({waiting_for})") from error
        return answers

    def others(self) -> list[Any]:
        """For each node, the agent of the one that holds the copies of its snapshots in memory."""
        return [self.agents[node] for node in buddies([node.ray_node for node in self.nodes])]

    def close(self) -> None:
        """Give back what was taken of an existing cluster, or end the embedded one; the ranks end with their agents."""
        if self.folder is None and self._seats:
            self._dismiss()
        if self._connected:
            untyped.ray().shutdown()
            _let_ray_print(True)
        if self._daemons is not None:
            self._daemons.close()
        if self.folder is not None:
            sweep(self.folder)

    def _dismiss(self) -> None:
        ray = untyped.ray()
        with contextlib.suppress(Exception):  # an agent that is gone needs no goodbye
            ray.get([seat.agent.close.remote() for seat in self._seats if seat.agent is not None], timeout=5)
        from ray.util.placement_group import remove_placement_group

        for seat in self._seats:
            with contextlib.suppress(Exception):
                ray.kill(seat.agent)
            with contextlib.suppress(Exception):
                remove_placement_group(seat.group)


def loss_of(error: Exception) -> str:
    """What a failed call says of its agent: a few words, and on further lines whatever evidence there is."""
    exceptions = untyped.ray().exceptions
    if isinstance(error, exceptions.RayTaskError):
        return str(getattr(error, "cause", error))
    if isinstance(error, exceptions.RayActorError):
        return f"its agent died\n{str(error).strip().splitlines()[-1]}"  # the last line says of what
    return f"its agent is out of reach\n{error}"


def _let_ray_print(wanted: bool) -> None:
    """Whether Ray prints what its own processes report: it does even when told not to log, and we report ourselves."""
    worker: Any = importlib.import_module("ray._private.worker")
    worker._worker_logs_enabled = wanted  # as its debugger does; there is no public switch


def _set_ray_environment(address: str | None) -> None:
    """Say to Ray what it takes from its environment, once, before it is imported; what the user has set stays.

    It reports usage over the network unless told not to. Its processes listen on every interface, so the embedded
    cluster takes a token of its own, which never touches the disk; and a cluster on this machine is joined with the
    token that ``ray start`` left for it (https://docs.ray.io/en/latest/ray-security/token-auth.html). The variables
    stay set: Ray keeps the token for the life of the process, and so must the next cluster started from it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_AUTH_MODE" in os.environ:
        return
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    elif _is_here(address) and (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_MODE"] = "token"


def _is_here(address: str) -> bool:
    host = address.rpartition(":")[0]
    return host == "localhost" or host in interfaces().values()


def session_folder() -> Path:
    """A short-lived folder for Ray's session; short, since Unix socket paths hold 107 bytes."""
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="dltrain-", dir=parent if len(parent) <= 20 else "/tmp"))  # noqa: S108  # see above


def _start(demand: Demand, common: dict[str, Any], folder: Path) -> None:
    try:
        with children_lead_groups():
            untyped.ray().init(
                address="local",
                num_cpus=demand.cpus * demand.places,
                num_gpus=demand.gpus * demand.places,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                _temp_dir=str(folder),
                _system_config={"enable_worker_prestart": False},
                **common,
            )
    except Exception as error:  # whatever it was, there is no cluster
        raise ClusterError(f"Ray did not start: {error}") from error


def _join(address: str, common: dict[str, Any]) -> None:
    """Connect to the cluster at ``address``; raises JobError where none answers."""
    hint = "start one with 'ray start --head', or leave --address out for an embedded cluster"
    if "://" in address:
        what = f"{address} is for Ray's client, which cannot place nodes"
        raise JobError(
            Problem(what, "--address", "the cluster's own address, host:6379, from a machine that reaches it")
        )
    host, _, port = address.rpartition(":")
    try:
        if address != "auto":  # Ray itself tries for most of a minute
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT).close()
        untyped.ray().init(address=address, **common)
    except (OSError, ValueError, RuntimeError) as error:
        if os.environ.get("RAY_AUTH_MODE") != "token":
            hint += "; if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        raise JobError(Problem(f"no Ray cluster answers at {address}: {error}", "--address", hint)) from None
