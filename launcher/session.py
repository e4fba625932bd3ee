"""One launch from the first process to the last: fork server, cluster, agents, controller, and back."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import JobError, Problem
from ..core.job import Resources
from ..core.recovery import RecoverySpec
from .cluster import Cluster, session_folder
from .demand import Demand, Machine, demand_on
from .enlist import LEASE, Enlisting, Probe, check_servers, check_versions, with_torch
from .forkserver import PRELOAD, PRELOAD_PROBE
from .host import ForkServer, server_name
from .interrupt import StopRequests
from .messages import NodeInfo
from .precheck import check_job
from .rundir import RunDir


@dataclass(frozen=True)
class Options:
    """How to launch, beside what to launch.

    Attributes:
        address: of an existing Ray cluster; None starts an embedded one.
        runs: parent of the run directories.
        resume: "auto", "never", or the path or URL of a run directory or checkpoint folder.
        init_from: path or URL of a run directory or checkpoint folder to take only the weights from; or empty.
        keep_warm: seconds that an existing cluster's fork servers stay for the next launch on it.
        fresh: start every rank as a fresh interpreter instead of a fork.
        quiet: no words of our own on the terminal.
        preflight: look at the nodes, and refuse to start on a sick one.
        master_addr: address for the rendezvous; the default is node 0's.
        master_port: port for the rendezvous; 0 takes a free one.
        submission: the key of the submitted job that this launch belongs to; or empty.
        job_words: the job as a command line names it, for commands that are told; or empty.
    """

    address: str | None = None
    runs: str | Path = "runs"
    resume: str = "auto"
    init_from: str = ""
    keep_warm: float = 0.0
    fresh: bool = False
    quiet: bool = False
    preflight: bool = False
    master_addr: str | None = None
    master_port: int = 0
    submission: str = ""
    job_words: tuple[str, ...] = ()


@dataclass
class Session:
    """The processes of one launch. Enter it to start what takes longest; leave it and everything is gone."""

    options: Options
    resources: Resources
    recovery: RecoverySpec
    stop: StopRequests
    _demand: Demand | None
    """None before the existing cluster could be asked what it has."""
    _shared: Path | None = None
    """The folder that every node has to see."""
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    _scope: str = field(default_factory=lambda: secrets.token_hex(8))
    _server: ForkServer | None = None
    ask: Callable[[Resources, Sequence[Machine]], Demand] = demand_on
    """Settles the demand with an existing cluster's machines."""
    looks: bool = False
    """Nodes are only looked at: they may have other versions, and import no more than that takes."""
    sizes: Callable[[int], tuple[int, ...]] = lambda ranks: ()
    """From the ranks of a node to the numbers of nodes that the run may have."""
    _check: Future[list[Problem]] | None = None
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "dltrain-session"))

    def __post_init__(self) -> None:
        if self.resources.nproc_per_node == "cpu":
            self.environ["CUDA_VISIBLE_DEVICES"] = ""  # or ranks would take the GPUs that are there
        self.cluster = Cluster(self.options.address, self.recovery.start_timeout, self.stop.leave_if_asked)

    @property
    def demand(self) -> Demand:
        """What is asked of the cluster; settled by :meth:`connect` at the latest."""
        assert self._demand is not None
        return self._demand

    @property
    def embedded(self) -> bool:
        return self.options.address is None

    def __enter__(self) -> Session:
        self.cluster.check_process()
        if self.embedded:  # imports torch while Ray starts
            name, timeout = server_name(self._scope, self.environ, self._preload), self.recovery.start_timeout
            self._server = ForkServer.start(name, self.environ, timeout, self._preload)
            self.cluster.folder = session_folder()
            self._server.guard(self.cluster.folder)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.cluster.close()
        finally:
            if self._server is not None:
                self._server.close()
            self._threads.shutdown(wait=False, cancel_futures=True)

    def connect(self, phase: Callable[[str], None]) -> None:
        """Have Ray: the embedded cluster started, or the existing one joined, and the demand settled with it.

        Raises:
            ClusterError: the embedded one did not start.
            JobError: there is none at the address, or it can never hold the run.
        """
        phase("starting Ray" if self.embedded else f"joining the cluster at {self.options.address}")
        self.stop.leave_if_asked()
        with self.stop.kept():
            self.cluster.connect(self._demand)
        self.stop.leave_if_asked()
        if self._demand is None:
            self._demand = self.ask(self.resources, self.cluster.machines())

    def begin_check(self, job: dict[str, Any]) -> None:
        """Start trying the job's code beside Ray's start, where this machine has a fork server."""
        server = self._server
        if server is None:
            return

        def check() -> list[Problem]:
            timeout = self.recovery.start_timeout
            server.hello(keep_warm=0, timeout=timeout)
            return check_job(server, job, environ=self.environ, cwd=str(Path.cwd()), timeout=timeout)

        self._check = self._threads.submit(check)

    @property
    def _preload(self) -> Sequence[str]:
        return PRELOAD_PROBE if self.looks else PRELOAD

    def place(self, phase: Callable[[str], None]) -> None:
        """Have one agent a node, each with a fork server that has torch imported.

        Args:
            phase: told what is waited for.

        Raises:
            ClusterError: in time there was no room, no agent, or no fork server.
            JobError: the nodes do not match this machine's versions.
        """
        phase("waiting for nodes")
        cluster = self.cluster
        cluster.place(self.demand, self._scope if self.embedded else "", self.environ, self._preload)
        prepared = [self._prepare(agent, math.inf if self.looks else LEASE) for agent in cluster.agents]
        interface = self.resources.network_interface
        nodes: list[NodeInfo] = cluster.call("describe", interface, waiting_for="describing its machine")
        if not self.looks:
            check_versions(nodes, nodes[0].versions)
        phase("importing torch on the nodes")
        servers = cluster.gather(prepared, waiting_for="importing torch")
        check_servers(nodes, servers)
        nodes = [with_torch(node, facts) for node, facts in zip(nodes, servers, strict=True)]
        if not self.looks:
            check_versions(nodes, nodes[0].versions)
        cluster.number(nodes)

    def _prepare(self, agent: Any, lease: float) -> Any:
        """Have an agent connect to its fork server; the reference to what that says of itself."""
        keep_warm = 0.0 if self.embedded else self.options.keep_warm  # nobody could find an embedded one's again
        lease = math.inf if self.embedded else lease  # on one machine there is nothing to be cut off by
        return agent.prepare.remote(keep_warm=keep_warm, timeout=self.recovery.start_timeout, lease=lease)

    def check(self, job: dict[str, Any]) -> list[Problem]:
        """The problems of the job's code: from the check that was begun, else tried on node 0."""
        if self._check is None:
            timeout = self.recovery.start_timeout
            ref = self.cluster.agents[0].check.remote(job, str(Path.cwd()), timeout=timeout)
            return self.cluster.gather([ref], waiting_for="checking the job's recipe and data")[0]
        while not self._check.done():
            self.stop.leave_if_asked()
            wait([self._check], timeout=0.25)
        return self._check.result()

    def check_shared(self, folder: Path) -> None:
        """Make the folder, and see that every node sees it: each rank writes its part of a checkpoint there.

        Raises:
            JobError: a node does not.
        """
        if self.embedded:
            return
        folder = self._shared = folder.absolute()
        with closing(Probe(folder)) as probe:
            answers = self.cluster.call("sees", *probe.question, waiting_for=f"looking for {folder}")
        pairs = zip(self.cluster.nodes, answers, strict=True)
        blind = ", ".join(f"node {node.node} ({node.hostname})" for node, sees in pairs if not sees)
        if blind:
            what = f"{blind} does not see {folder}, where checkpoints go"
            raise JobError(
                Problem(what, "checkpoint.to", "a folder that all machines share, or a URL as s3://bucket/run")
            )

    def enlist(self, agent: Any, run: RunDir, logs: Path) -> Enlisting:
        """Begin to prepare an agent that comes later, as is done at first with all."""
        prepared = self._prepare(agent, LEASE)
        described = agent.describe.remote(self.resources.network_interface)
        adopted = agent.adopt.remote(str(run.path), run.record.id, str(logs))
        probe = Probe(self._shared) if self._shared is not None else None
        return Enlisting(agent, prepared, described, adopted, probe, self.cluster.nodes[0].versions)

    def adopt(self, run: RunDir, logs: Path) -> None:
        """Tell the nodes of the run directory, and learn which of them see it."""
        cluster = self.cluster
        shares = cluster.call("adopt", str(run.path), run.record.id, str(logs), waiting_for="looking for the run")
        pairs = zip(cluster.nodes, shares, strict=True)
        cluster.nodes = [replace(node, shares_run_dir=self.embedded or sees) for node, sees in pairs]
        self.stop.leave_if_asked()
        cluster.interrupted = _go_on  # from here on the controller hears of a stop


def _go_on() -> None:
    pass
