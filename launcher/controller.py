"""The controller: starts generations of ranks, hears everything, asks the policy, and acts on its decision."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.persister import AFTERLIFE
from ..core.errors import Problem
from ..core.recovery import RecoverySpec
from . import untyped
from .cluster import Cluster, ClusterError, loss_of
from .failure import Cost
from .generation import Generation, Program, plan_generation
from .goodput import Goodput
from .intake import Intake
from .interrupt import StopRequests
from .messages import AgentReport, NodeInfo
from .metrics import Metrics
from .policy import Decision, History, Status, decide, patience
from .recall import Origin, Recall
from .roster import Roster
from .rundir import RunDir
from .stacks import Look
from .stall import StallWatch, stalled, tell_stall
from .succession import Succession
from .view import View

_POLL = 0.5
_TURN = 0.02  # seconds that news are waited for where a decision is near
_SILENCE = 30.0
_GLANCE = 1.0  # most seconds that count between two looks: when this process was stopped, agents were not silent
_DRAIN = 10.0
_LAST_SAVE = 0.1  # seconds that a checkpoint may still take where a newer snapshot is in memory
_ASK = 10.0
_PATIENCE = 3.0  # seconds that are waited without a word
_LOOK = 2.0
_FRUITFUL = 60.0  # seconds that a start of a script, which has no steps of ours, lives if it gets anywhere


@dataclass(frozen=True)
class Ending:
    """How a run ended: the last decision, what rank 0 said at the end, the last failure report's path, restarts and
    what they cost.
    """

    decision: Decision
    said: dict[str, Any]
    report: Path | None
    restarts: int
    refused: tuple[Problem, ...] = ()
    costs: tuple[Cost, ...] = ()


class Controller:
    """Runs one program on a placed cluster, to its end."""

    def __init__(
        self,
        cluster: Cluster,
        program: Program,
        *,
        run: RunDir,
        nproc: int,
        recovery: RecoverySpec,
        metrics: Metrics,
        goodput: Goodput,
        view: View,
        stop: StopRequests,
        logs: Path,
        environ: dict[str, str],
        roster: Roster,
        show_nodes: Callable[[Sequence[NodeInfo]], None],
        fence: Callable[[int], None],
        master_addr: str | None = None,
        master_port: int = 0,
    ) -> None:
        self._cluster, self._program, self._run = cluster, program, run
        self._nproc, self._recovery = nproc, recovery
        self._metrics, self._goodput, self._view, self._stop = metrics, goodput, view, stop
        self._logs, self._environ = logs, environ
        self._master_addr, self._master_port = master_addr, master_port
        self._roster, self._show_nodes = roster, show_nodes
        self._fence = fence
        self._succession = Succession(roster, recovery, view=view, stop=stop, meanwhile=metrics.tick)
        self._polls: dict[Any, Any] = {}
        self._unheard: dict[int, float] = {}
        self._looked = 0.0
        self._intake = Intake(
            run,
            metrics=metrics,
            goodput=goodput,
            view=view,
            logs=logs,
            speaks=program.kind == "worker",
            remedies=program.remedies,
        )
        self._recall = Recall(self._intake, metrics, nproc=nproc)

    def run(self) -> Ending:
        """Start generations until the policy says that it is over."""
        history = History(self._recovery.max_restarts, replaces=self._recovery.replaces)
        number, restarts, reached = self._run.record.generations, 0, self._metrics.last_step
        origin = Origin()
        while True:
            self._run.update(generations=number + 1)
            generation = self._start(number, origin, restart=restarts, reached=reached)
            nodes = self._cluster.nodes
            decision = self._watch(generation, history)
            origin = self._end(generation, decision)
            number += 1
            self._run.update(step=self._metrics.last_step)
            changed = ""
            if decision.action in ("restart", "regroup"):
                decision, changed = self._succession.settle(generation, decision)
                if changed:
                    origin = self._recall.assemble(generation, origin, self._cluster.agents, self._ask, self._gather)
            if decision.action in ("fail", "restart") or decision.signum:
                report = self._intake.report(generation, decision, nodes, changed)
                evidence = self._program.kind != "script"  # a script's output has been shown
                self._intake.reports.write(report, evidence=evidence)
            if decision.action not in ("restart", "regroup"):
                said, reports = self._intake.last_words, self._intake.reports
                refused, costs = tuple(generation.refused), tuple(reports.costs)
                return Ending(decision, said, reports.newest, restarts, refused, costs)
            restarts += decision.action == "restart"
            history = history.after(decision, lost=bool(generation.lost), fruitful=self._fruitful(generation))
            reached = self._intake.reached(generation)
            self._goodput.restart()
            if generation.lost:
                self._fence(number)  # what runs on a lost node may only be out of reach
            self._tell(decision, changed, history, origin)

    def _tell(self, decision: Decision, changed: str, history: History, origin: Origin) -> None:
        """Say how it goes on, and with which nodes."""
        if changed:
            self._show_nodes(self._cluster.nodes)
        again = "starting all ranks again"
        if decision.counts and history.max_restarts != "auto":
            again += f" ({len(history.culprits)} of {history.max_restarts})"
        report = self._intake.reports.where if decision.action == "restart" else ""
        self._view.note("; ".join(filter(None, [decision.reason, changed, f"{again}{origin}", report])))

    # ---- starting

    def _start(self, number: int, origin: Origin, *, restart: int, reached: int) -> Generation:
        cluster, nodes = self._cluster, self._cluster.nodes
        world = len(nodes) * self._nproc
        generation = Generation(number, world, self._nproc, step=reached, point=origin.point, memory=origin.memory)
        limit = self._recovery.stall if self._program.kind == "worker" else "never"
        watched = StallWatch(limit, self._recovery.stall_at_start, before=self._intake.watched)
        self._intake.begin(generation.world, watched)
        self._view.phase("starting ranks")
        machines = len({node.ray_node for node in nodes})
        address = self._master_addr or ("127.0.0.1" if machines == 1 else nodes[0].address)
        timeout = self._recovery.start_timeout
        store = cluster.agents[0].open_store.remote(address, self._master_port, timeout)
        where = f"{address}:{self._master_port or 'a free port'}"
        ports = self._gather(generation, {0: store}, f"a rendezvous store on {where}", timeout)
        if not ports:
            generation.closed = set(range(generation.world))  # none was started
            return generation
        copies = self._program.kind == "worker" and self._recovery.copies_among(len(nodes), machines=machines)
        plans = plan_generation(
            self._program,
            nodes,
            nproc=self._nproc,
            generation=number,
            restart=restart,
            master=(address, ports[0]),
            logs=self._logs,
            environ=self._environ,
            facts={"saved": self._intake.saved, "interrupted": origin.interrupted, "copies": copies},
        )
        others = cluster.others() if copies else [None] * len(nodes)
        pairs = enumerate(zip(cluster.agents, plans, others, strict=True))
        starts = {node: agent.start.remote(number, plan, origin.point, other) for node, (agent, plan, other) in pairs}
        self._gather(generation, starts, "forking ranks", timeout)
        self._unheard = dict.fromkeys(range(len(nodes)), 0.0)
        return generation

    # ---- watching

    def _watch(self, generation: Generation, history: History) -> Decision:
        """Hear the agents until the policy decides something else than to wait."""
        trouble_since: float | None = None
        told_to_stop: float | None = None
        while True:
            self._hear(generation, _TURN if trouble_since else _POLL / 2)
            self._metrics.tick()
            self._settle()
            self._look_for_stall(generation)
            self._look_for_nodes(generation, history)
            if self._stop.count and told_to_stop is None:
                told_to_stop = time.monotonic()
                self._ask_to_stop(generation)
            if self._stop.count > 1:
                return Decision("stopped", "stopped at once, without a last checkpoint")
            decision = decide(self._status(generation), history)
            if told_to_stop is not None and time.monotonic() - told_to_stop > self._recovery.stop_grace:
                return Decision("stopped", f"ranks did not end within {self._recovery.stop_grace:g} s and were killed")
            if decision.action == "wait":
                continue
            if decision.action in ("finish", "refuse"):
                return decision
            trouble_since = trouble_since or time.monotonic()
            enough = patience(decision.culprit, told=generation.told())
            if time.monotonic() - trouble_since >= enough or not generation.alive():
                return decision

    def _settle(self) -> None:
        """Tell rank 0's persister once the metrics that it wants to save a checkpoint over are on the disk."""
        if self._intake.settling is not None and self._metrics.settled(self._intake.settling):
            self._cluster.agents[0].tell_persister.remote(0, {"t": "settled", "step": self._intake.settling})
            self._intake.settling = None

    def _status(self, generation: Generation) -> Status:
        return generation.status(
            broken=self._cluster.broken(),
            complete=self._intake.last_words.get("status") == "finished",
            stop_asked=self._stop.count > 0,
            fruitful=self._fruitful(generation),
        )

    def _fruitful(self, generation: Generation) -> bool:
        """Whether it has got anywhere."""
        long = self._program.kind == "script" and time.monotonic() - generation.since > _FRUITFUL
        return long or self._intake.reached(generation) > generation.step

    def _look_for_stall(self, generation: Generation) -> None:
        """Where no rank gets any further, say who is to blame, and find out before anything is ended."""
        watched = self._intake.watched
        if generation.standstill is not None or generation.casualties or generation.lost:
            return
        told = watched.held_up()
        if not told and not stalled(watched.places()):
            return
        found: dict[int, dict[int, Look]] = self._ask(generation, "look", _LOOK, waiting_for="looking at its ranks")
        self._hear(generation)
        looks = {rank: look for looks in found.values() for rank, look in looks.items()}
        watched.learn(looks)
        places = watched.places()
        if generation.casualties:  # it has failed meanwhile
            return
        if stalled(places):  # it has not gone on either
            generation.standstill = tell_stall(places, looks, time.time())
        elif still := [place for place in places if (place.rank, place.order) in [(at.rank, at.order) for at in told]]:
            self._view.note("\n".join(tell_stall(places, looks, time.time(), hindmost=still).words()))

    def _look_for_nodes(self, generation: Generation, history: History) -> None:
        """Where lost nodes are replaced, look after those that wait; where the run could have more, have ranks save."""
        if not history.goes_on:
            return
        self._roster.tick()
        steady = not (generation.casualties or generation.lost or self._stop.count or generation.regrouping)
        now, better = len(self._cluster.agents), self._roster.better()
        begun = len(generation.started) == generation.world
        if steady and begun and better > now and self._program.kind == "worker":
            generation.regrouping = True
            self._ask(generation, "tell", {"t": "stop"}, waiting_for="passing on the stop")
            self._view.note(f"there are {better} nodes now instead of {now}: saving a checkpoint to go on with all")

    def _ask_to_stop(self, generation: Generation) -> None:
        grace = self._recovery.stop_grace
        if self._program.kind == "worker":
            self._view.note(f"stopping: saving a checkpoint (at most {grace:g} s; Ctrl-C again stops at once)")
            self._ask(generation, "tell", {"t": "stop"}, waiting_for="passing on the stop")
        else:
            self._view.note(f"stopping: {signal.Signals(self._stop.signum).name} to all ranks (at most {grace:g} s)")
            self._ask(generation, "signal", self._stop.signum, waiting_for="passing on the stop")

    def _ask(self, generation: Generation, method: str, *args: Any, waiting_for: str) -> dict[int, Any]:
        """Call a method of every agent that is there; the answers by node. One that is gone is noted as lost."""
        agents = enumerate(self._cluster.agents)
        refs = {node: getattr(agent, method).remote(*args) for node, agent in agents if node not in generation.lost}
        return self._gather(generation, refs, waiting_for, _ASK)

    def _gather(self, generation: Generation, refs: dict[int, Any], waiting_for: str, timeout: float) -> dict[int, Any]:
        """The answers by node. One that gives none, or is gone meanwhile, is noted as lost.

        Raises:
            ClusterError: one could not do it for want of something on its machine.
        """
        ray = untyped.ray()
        deadline = time.monotonic() + timeout
        answers: dict[int, Any] = {}
        while left := {node: ref for node, ref in refs.items() if node not in answers and node not in generation.lost}:
            for ref in ray.wait(list(left.values()), num_returns=len(left), timeout=_POLL / 2)[0]:
                node = next(node for node in left if left[node] == ref)
                try:
                    answers[node] = ray.get(ref)
                except ray.exceptions.RayError as error:
                    if isinstance(getattr(error, "cause", None), OSError):  # what was asked for cannot be had
                        raise ClusterError(f"node {node}: {waiting_for}: {error.cause}") from error
                    generation.lose({node: f"{loss_of(error)}\n({waiting_for})"})
            generation.lose(self._roster.silent(self._intake.watched.still()))
            if time.monotonic() > deadline:
                late = f"its agent gave no answer within {timeout:g} s: {waiting_for}"
                generation.lose({node: late for node in left if node not in answers})
        return answers

    def _hear(self, generation: Generation, wait: float = _POLL / 2) -> None:
        """One round of polls: whatever the agents have to tell, waiting ``wait`` seconds for the first."""
        ray = untyped.ray()
        for node, agent in enumerate(self._cluster.agents):
            if node not in generation.lost and all(polled is not agent for polled in self._polls.values()):
                self._polls[agent.poll.remote(_POLL)] = agent
        ray.wait(list(self._polls), timeout=wait)
        for ref in ray.wait(list(self._polls), num_returns=len(self._polls), timeout=0)[0]:
            agent = self._polls.pop(ref)
            node = next((node for node, known in enumerate(self._cluster.agents) if known is agent), None)
            if node is None:  # its place was taken
                continue
            try:
                report: AgentReport = ray.get(ref)
            except ray.exceptions.RayError as error:
                generation.lose({node: loss_of(error)})
                continue
            self._roster.heartbeats.heard(agent)
            self._unheard[node] = 0.0
            self._view.beats(node, report.beats)
            self._intake.watched.take(node, report.beats, time.monotonic())
            for event in report.events:
                if event.generation == generation.number:
                    self._intake.take(generation, self._cluster.nodes[node], event)
        looked, self._looked = self._looked, time.monotonic()
        for node in self._unheard:
            self._unheard[node] += min(self._looked - looked, _GLANCE)
            if self._unheard[node] > _SILENCE:
                generation.lose({node: f"its agent has told nothing for {_SILENCE:g} s"})
        generation.lose(self._roster.silent(self._intake.watched.still()))

    # ---- ending

    def _end(self, generation: Generation, decision: Decision) -> Origin:
        """See every rank of the generation to its end and take in the rest of its output; what the next one goes on
        from.
        """
        generation.ending = True
        if self._cluster.broken():
            return Origin()  # the agents end with it, and their ranks with them
        self._view.phase("ending ranks")
        gentle = self._program.kind == "script" and decision.action in ("fail", "restart")
        if gentle:
            self._ask(generation, "signal", signal.SIGTERM, waiting_for="sending SIGTERM")
            self._drain(generation, min(5.0, self._recovery.stop_grace))
        if generation.alive():
            self._ask(generation, "signal", signal.SIGKILL, waiting_for="sending SIGKILL")
        origin = self._find_origin(generation) if decision.action == "restart" else Origin()
        if decision.action in ("fail", "restart") and origin.point is None:
            self._finish_saving(generation)  # else there was time to save, or there is to be none, or no need
        self._ask(generation, "abandon_saves", waiting_for="ending what still saves")
        self._drain(generation, _DRAIN)
        self._ask(generation, "close_stores", waiting_for="closing the rendezvous store")
        return origin

    def _find_origin(self, generation: Generation) -> Origin:
        """What the ranks go on from, once all have ended."""
        if self._program.kind != "worker" or self._recovery.snapshot == "never":
            return Origin()
        deadline = time.monotonic() + _DRAIN
        while generation.alive() and time.monotonic() < deadline:
            self._hear(generation)
        origin = self._recall.find(generation, partial(self._ask, generation))
        deadline = time.monotonic() + _LAST_SAVE
        while generation.present() and time.monotonic() < deadline:  # one that saves nothing ends at once
            self._hear(generation)
            self._settle()
        return replace(origin, interrupted=bool(generation.present() or generation.lost))

    def _finish_saving(self, generation: Generation) -> None:
        """Let the ranks' persisters finish the snapshot that they were given: they outlive their ranks for a while."""
        begin, asked = time.monotonic(), self._stop.count
        told = alone = False
        while generation.present() and (waited := time.monotonic() - begin) < AFTERLIFE + _DRAIN:
            if self._stop.count > asked:
                return
            self._hear(generation)
            self._settle()
            if generation.present() == {0} and not alone:  # what other ranks have not written will not come
                alone = True
                self._cluster.agents[0].tell_persister.remote(0, {"t": "alone"})
            if waited > _PATIENCE and not told:
                told = True
                self._view.note(f"waiting for a checkpoint that is being written (at most {AFTERLIFE:g} s)")

    def _drain(self, generation: Generation, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while generation.present() and time.monotonic() < deadline and self._stop.count < 3:
            self._hear(generation)
