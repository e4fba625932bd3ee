"""The node agent: one Ray actor a node, between the controller and the node's rank processes.

It holds a lease on the machine's fork server, starts and signals ranks, reads their channels, pulses and output, and
answers the controller's polls. One thread does all the input and output; the actor's own threads only queue requests
and wait for news. Imports stay light (no torch): every node pays for them at start.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import Problem
from ..core.memory import RecentKills
from ..core.processes import Process
from ..core.wire import Channel
from . import untyped
from .errand import Outcome, send
from .held_rank import HeldRank, fork_rank
from .host import ChildEvent, ForkServer, HostError, server_name
from .machine import describe_machine, interface_address, rank_environment
from .messages import AgentReport, ChildSpec, NodeInfo, Point, RankEvent, RankPlan
from .node_memory import NodeMemory
from .precheck import check_job
from .rundir import Record
from .stacks import Look, look_at
from .vitals import Vitals, examine

BEAT = "beat"
"""Concurrency group of :meth:`NodeAgent.beat`: a thread of its own, so that no other call can hold it up."""

_TAIL_INTERVAL = 0.1
_GLANCE = 1.0  # most seconds that count between two looks: an agent that was held up itself has not been left alone


class NodeAgent(NodeMemory):
    """One node's side of a run. Methods are called by the controller through Ray, several at a time."""

    def __init__(
        self, node: int, scope: str, environ: dict[str, str], same_machine: bool, preload: Sequence[str]
    ) -> None:
        super().__init__()
        self._node = node
        self._preload = preload
        self._same_machine = same_machine
        self._sees_logs = same_machine
        self._environ = rank_environment(environ, dict(os.environ), same_machine=same_machine)
        self._server_name = server_name(scope, self._environ, preload)
        self._stores: list[int] = []
        self._server: ForkServer | None = None
        self._selector = selectors.DefaultSelector()
        self._closing = False
        self._lease = math.inf
        self._alone = 0.0
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._kills = RecentKills()
        self._terminated = self._notified = False
        if threading.current_thread() is threading.main_thread():
            self._before: Any = signal.signal(signal.SIGTERM, self._preempt)

    def _preempt(self, signum: int, frame: Any) -> None:
        """This node is to be taken away: give its ranks the notice, and stay until they have saved a checkpoint."""
        if (self._terminated or not self._ranks) and callable(self._before):
            self._before(signum, frame)
        self._terminated = True  # the thread that holds the lock may be this one, so the other one tells them

    def describe(self, interface: str | None) -> NodeInfo:
        """This machine.

        Raises:
            JobError: there is no network interface of that name here.
        """
        ray = untyped.ray()
        context = ray.get_runtime_context()
        address = interface_address(interface) if interface else ray.util.get_node_ip_address()
        versions = {"ray": ray.__version__}
        return describe_machine(
            self._node, interface, address=address, ray_node=context.get_node_id(), versions=versions
        )

    def beat(self) -> None:
        """Say that this agent is there, and learn that the controller is."""
        self._alone = 0.0

    def prepare(self, *, keep_warm: float, timeout: float, lease: float) -> dict[str, Any]:
        """Connect to the machine's fork server, starting it if need be, and wait until it has imported torch.

        Args:
            lease: seconds without a call from the controller after which this node ends its ranks: it has been cut off,
                and others may have taken their place.

        Raises:
            HostError: it did not come up in time; the text says why.
        """
        server = self._lease_server(timeout)
        facts = server.hello(keep_warm=keep_warm, timeout=timeout)
        self._server = server
        self._lease = lease
        self._selector.register(server, selectors.EVENT_READ)
        threading.Thread(target=self._work, name="dltrain-agent-io", daemon=True).start()
        return facts

    def check(self, job: dict[str, Any], cwd: str, *, timeout: float) -> list[Problem]:
        """Try the job's recipe and data on this machine, on a lease of its own; the problems found."""
        server = self._lease_server(timeout)
        try:
            server.hello(keep_warm=0, timeout=timeout)
            return check_job(server, job, environ=self._environ, cwd=cwd, timeout=timeout)
        finally:
            server.close()

    def errand(self, child: ChildSpec, *, timeout: float) -> Outcome:
        """Fork ``child`` on a lease of its own, and wait for what comes of it."""
        server = self._lease_server(timeout)
        try:
            server.hello(keep_warm=0, timeout=timeout)
            return send(server, replace(child, env={**self._environ, **child.env}), timeout)
        finally:
            server.close()

    def examine(self, folder: str, url: str, options: dict[str, Any]) -> Vitals:
        """The state of this machine."""
        return examine(folder=folder, url=url, options=options)

    def adopt(self, run_dir: str, run_id: str, logs: str) -> bool:
        """Whether this node sees the run's directory, with the logs in it, and not merely a folder of that name."""
        if not self._same_machine:
            record = Record.read(Path(run_dir))
            same = record is not None and record.id == run_id
            self._sees_logs = same and Path(logs).is_relative_to(run_dir)
        return self._sees_logs

    def sees(self, path: str, text: str, timeout: float) -> bool:
        """Whether the file at ``path`` says ``text`` here too, within ``timeout`` seconds: network file systems lag."""
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError, ValueError):
                if Path(path).read_text(encoding="utf-8") == text:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)

    def open_store(self, address: str, port: int, timeout: float) -> int:
        """Host a rendezvous store for one generation on ``address``; its port (free when ``port`` is 0)."""
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(4096)
        port = listener.getsockname()[1]
        body = {"address": address, "port": port, "timeout": timeout}
        spec = ChildSpec(kind="store", label="dltrain-store", env=self._environ, cwd="/", body=body)
        null = os.open(os.devnull, os.O_WRONLY)
        with self._lock:
            store = self._require_server().fork(spec, {"stdout": null, "stderr": null, "listener": listener.fileno()})
            self._stores.append(store)
        os.close(null)
        listener.close()
        return port

    def start(self, generation: int, plans: list[RankPlan], point: Point | None, copies_to: Any) -> None:
        """Fork this node's ranks of a generation. How it goes comes as events.

        Args:
            point: the snapshot in memory that they go on from; other images are let go.
            copies_to: the agent that gets copies of their snapshots; None for no copies.
        """
        with self._lock:
            self._hear_memory()
            self._images.begin(point, [plan.rank for plan in plans])
            self._generation = generation
            self._copier.begin(generation, copies_to)
            for plan in plans:
                self._start_rank(generation, plan, point)

    def poll(self, timeout: float) -> AgentReport:
        """What happened since the last poll, waiting at most ``timeout`` seconds for something to happen.

        Raises:
            HostError: the fork server, or this agent's own thread, broke.
        """
        self._alone = 0.0
        events = self._news.take(timeout)
        now = time.monotonic()
        with self._lock:
            ranks = [rank for rank in self._ranks.values() if not rank.ended]
            return AgentReport(events, [rank.beat(now) for rank in ranks])

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to every living rank."""
        with self._lock:
            for rank in self._ranks.values():
                if not rank.ended:
                    rank.channel.send(message)

    def tell_persister(self, number: int, message: dict[str, Any]) -> None:
        """Send a message to a rank's persister, if that is on this node and still there."""
        with self._lock:
            for rank in self._ranks.values():
                if rank.plan.rank == number and rank.news is not None:
                    rank.news.send(message)

    def abandon_saves(self) -> None:
        """Have every persister end at once, whatever it is writing."""
        with self._lock:
            for rank in self._ranks.values():
                if rank.news is not None:
                    rank.news.end()  # its closing in turn says that it has ended

    def signal(self, signum: int) -> None:
        """Send a signal to the process group of every living rank."""
        with self._lock:
            for child, rank in self._ranks.items():
                if not rank.ended:
                    self._require_server().signal(child, signum)

    def look(self, timeout: float) -> dict[int, Look]:
        """What the processes of the living ranks do, and their Python stacks where they can show them (jobs' can)."""
        with self._lock:
            ranks = {
                rank.plan.rank: (rank.process, os.dup(rank.sheet.fd))
                for rank in self._ranks.values()
                if rank.process is not None and not rank.ended and rank.pulse.read().phase not in ("start", "user")
            }
        try:
            return look_at(ranks, timeout)
        finally:
            for _, fd in ranks.values():
                os.close(fd)

    def close_stores(self) -> None:
        """End the rendezvous stores that this node hosts."""
        with self._lock:
            for store in self._stores:
                self._require_server().signal(store, signal.SIGKILL)
            self._stores.clear()

    def close(self) -> None:
        """Give up the lease: whatever still runs is killed by the fork server."""
        self._closing = True
        self._copier.close()
        self.abandon_saves()
        with self._lock:
            if self._server is not None:
                self._server.close()
            self._images.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    # ---- starting

    def _lease_server(self, timeout: float) -> ForkServer:
        """A lease on the one fork server of this agent, also when the package was changed meanwhile."""
        return ForkServer.start(self._server_name, self._environ, timeout, self._preload)

    def _require_server(self) -> ForkServer:
        if self._server is None:
            raise HostError("this node agent has no fork server: prepare() comes first")
        return self._server

    def _log_dir(self, plan: RankPlan) -> Path:
        """The rank's log folder: as planned where this node sees that, else in a temporary folder here."""
        folder = Path(plan.log_dir)
        if not self._sees_logs:
            if self._scratch is None:
                self._scratch = tempfile.TemporaryDirectory(prefix="dltrain-logs-")
            folder = Path(self._scratch.name, *folder.parts[-2:])
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _start_rank(self, generation: int, plan: RankPlan, point: Point | None) -> None:
        before = [rank for rank in self._ranks.values() if rank.plan.rank == plan.rank]
        reading = any(rank.news is not None and not rank.news.closed for rank in before)

        def hand_over(memory: socket.socket) -> None:
            if point is not None:
                self._images.hand_over(point, plan.rank, memory, reading=reading)

        server, folder = self._require_server(), self._log_dir(plan)
        key, rank = fork_rank(server, generation, plan, folder, self._environ, hand_over)
        self._ranks[key] = rank

    # ---- the one thread that reads

    def _work(self) -> None:
        try:
            looked = time.monotonic()
            while not self._closing:
                self._selector.select(_TAIL_INTERVAL)
                self._round()
                looked, before = time.monotonic(), looked
                self._alone = self._alone + min(looked - before, _GLANCE) if self._ranks else 0.0
                if self._alone > self._lease:
                    self.close()
                    raise HostError(f"it heard nothing of the controller for {self._lease:g} s, and ended its ranks")
        except Exception as error:
            if not self._closing or self._alone > self._lease:
                self._news.end(str(error) if isinstance(error, HostError) else traceback.format_exc())

    def _round(self) -> None:
        with self._lock:
            if self._terminated and not self._notified:
                self._notified = True
                for rank in self._ranks.values():
                    if rank.process is not None and not rank.ended:
                        rank.process.signal(signal.SIGTERM)  # not to its group: others there have to save
            events = [] if self._closing else self._require_server().events()
            found: list[RankEvent] = []
            for event in events:
                found.extend(self._on_child(event))
            for key, rank in list(self._ranks.items()):
                found.extend(self._read_messages(rank))
                found.extend(self._read_output(rank))
                if rank.over():
                    found.append(self._event(rank, "closed"))
                    self._forget(key)
            self._let_go()
            if self._ranks:
                self._kills.look(time.monotonic())
        if found:
            self._news.tell(found)

    def _on_child(self, event: ChildEvent) -> list[RankEvent]:
        rank = self._ranks.get(event.id)
        if rank is None:
            if event.exit is not None and event.id in self._stores:
                self._stores.remove(event.id)
            return []
        if event.exit is None:
            rank.process = Process.of(event.pid)
            self._selector.register(rank.channel, selectors.EVENT_READ)
            if rank.news is not None:
                self._selector.register(rank.news, selectors.EVENT_READ)
            return [self._event(rank, "started", pid=event.pid)]
        rank.ended = True
        recorded = rank.recorded_error()
        beat = rank.pulse.read()
        kills = self._kills.since(rank.oom_kills)
        why = {"what": event.what, "error_file": recorded, "step": beat.step, "phase": beat.phase, "oom_kills": kills}
        return [*self._read_messages(rank), self._event(rank, "exit", exit=event.exit, data=why)]

    def _read_messages(self, rank: HeldRank) -> list[RankEvent]:
        """What the rank and its persister have said."""
        found: list[RankEvent] = []
        for channel in (rank.news, rank.channel):
            if channel is not None and not channel.closed:
                found += [self._event(rank, "message", data=message) for message in channel.receive()]
                if channel.closed:
                    self._unregister(channel)
        return found

    def _unregister(self, channel: Channel) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(channel)

    def _read_output(self, rank: HeldRank) -> list[RankEvent]:
        found: list[RankEvent] = []
        if not self._news.full:  # the files keep what the controller has no time for yet
            for tail in rank.tails:
                text = tail.read()
                if text:
                    found.append(self._event(rank, "log", stream=tail.stream, text=text))
        return found

    def _event(self, rank: HeldRank, kind: Any, **fields: Any) -> RankEvent:
        return RankEvent(kind, rank.generation, rank.plan.rank, **fields)

    def _forget(self, key: int) -> None:
        rank = self._ranks.pop(key)
        if rank.memory is not None:
            self._images.hear(rank.plan.rank, rank.memory)
        if not rank.channel.closed:
            self._unregister(rank.channel)
        rank.close()
