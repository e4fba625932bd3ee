"""The controller: starts generations of ranks, hears everything, asks the policy, and acts on its decision."""

from __future__ import annotations

import signal
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.persister import AFTERLIFE
from ..core.errors import DltrainError, Problem
from ..core.recovery import RecoverySpec
from . import untyped
from .cluster import Cluster, loss_of
from .failure import Report, blamed
from .generation import Generation, Program, plan_generation
from .goodput import Goodput
from .intake import Intake
from .interrupt import StopRequests
from .messages import AgentReport
from .metrics import Metrics
from .policy import Decision, History, RankFailure, Status, decide
from .rundir import RunDir
from .stacks import Look
from .stall import StallWatch, stalled, tell_stall
from .view import View

_POLL = 0.5
_WITNESS_TIME = 0.3  # seconds to hear of other failures after the first, so that the report names the true first
_SILENCE = 30.0
_DRAIN = 10.0
_ASK = 10.0
_PATIENCE = 3.0  # seconds that are waited without a word
_LOOK = 2.0


@dataclass(frozen=True)
class Ending:
    """How a run ended: the last decision, what rank 0 said at the end, the last failure report's path, and restarts."""

    decision: Decision
    said: dict[str, Any]
    report: Path | None
    restarts: int
    refused: tuple[Problem, ...] = ()


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
        master_addr: str | None = None,
        master_port: int = 0,
    ) -> None:
        self._cluster, self._program, self._run = cluster, program, run
        self._nproc, self._recovery = nproc, recovery
        self._metrics, self._goodput, self._view, self._stop = metrics, goodput, view, stop
        self._logs, self._environ = logs, environ
        self._master_addr, self._master_port = master_addr, master_port
        self._polls: dict[Any, int] = {}
        self._heard: dict[int, float] = {}
        self._intake = Intake(
            run,
            metrics=metrics,
            goodput=goodput,
            view=view,
            logs=logs,
            speaks=program.kind == "worker",
            remedies=program.remedies,
        )

    def run(self) -> Ending:
        """Start generations until the policy says that it is over."""
        culprits: deque[RankFailure | None] = deque()
        restarts = 0
        number = self._run.record.generations
        while True:
            self._run.update(generations=number + 1)
            generation = self._start(number, restart=restarts)
            history = History(self._recovery.max_restarts, tuple(culprits))
            decision = self._watch(generation, history)
            self._end(generation, decision)
            if decision.action in ("fail", "restart") or decision.signum:
                self._write_report(generation, decision)
            number += 1
            self._run.update(step=self._metrics.last_step)
            if decision.action != "restart":
                return Ending(
                    decision,
                    self._intake.last_words,
                    self._intake.reports.newest,
                    restarts,
                    tuple(generation.refused),
                )
            restarts += 1
            self._goodput.restart()
            again = "starting all ranks again"
            if decision.counts:
                culprits.append(decision.culprit)
                again += f" ({len(culprits)} of {history.max_restarts})"
            self._view.note(f"{decision.reason}; {again}; report: {self._intake.reports.newest}")

    # ---- starting

    def _start(self, number: int, *, restart: int) -> Generation:
        cluster = self._cluster
        nodes = cluster.nodes
        self._view.phase("starting ranks")
        embedded = len({node.ray_node for node in nodes}) == 1
        address = self._master_addr or ("127.0.0.1" if embedded else nodes[0].address)
        timeout = self._recovery.start_timeout
        store = cluster.agents[0].open_store.remote(address, self._master_port, timeout)
        port = cluster.gather(
            [store], waiting_for=f"a rendezvous store on {address}:{self._master_port or 'a free port'}"
        )
        plans = plan_generation(
            self._program,
            nodes,
            nproc=self._nproc,
            generation=number,
            restart=restart,
            master=(address, port[0]),
            logs=self._logs,
            environ=self._environ,
        )
        starts = [agent.start.remote(number, plan) for agent, plan in zip(cluster.agents, plans, strict=True)]
        cluster.gather(starts, waiting_for="forking ranks")
        limit = self._recovery.stall if self._program.kind == "worker" else "never"
        watched = StallWatch(limit, self._recovery.stall_at_start)
        self._intake.begin(len(nodes) * self._nproc, watched)
        self._heard = dict.fromkeys(range(len(nodes)), time.monotonic())
        return Generation(number, len(nodes) * self._nproc, self._nproc)

    # ---- watching

    def _watch(self, generation: Generation, history: History) -> Decision:
        """Hear the agents until the policy decides something else than to wait."""
        trouble_since: float | None = None
        told_to_stop: float | None = None
        while True:
            self._hear(generation)
            self._metrics.tick()
            self._settle()
            self._look_for_stall(generation)
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
            if time.monotonic() - trouble_since >= _WITNESS_TIME:
                return decision

    def _settle(self) -> None:
        """Tell rank 0's persister once the metrics that it wants to save a checkpoint over are on the disk."""
        if self._intake.settling is not None and self._metrics.settled(self._intake.settling):
            self._cluster.agents[0].tell_persister.remote(0, {"t": "settled", "step": self._intake.settling})
            self._intake.settling = None

    def _status(self, generation: Generation) -> Status:
        return Status(
            world=generation.world,
            ended=len(generation.ended),
            failures=tuple(casualty.failure for casualty in generation.casualties.values()),
            lost_nodes={node: what.splitlines()[0].rstrip(":") for node, what in generation.lost.items()},
            broken=self._cluster.broken(),
            complete=self._intake.last_words.get("status") == "finished",
            stop_asked=self._stop.count > 0,
            preempted=generation.preempted,
            stall=generation.standstill.stall if generation.standstill else None,
        )

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
        answers: dict[int, Any] = {}
        agents = enumerate(self._cluster.agents)
        refs = {node: getattr(agent, method).remote(*args) for node, agent in agents if node not in generation.lost}
        for node, ref in refs.items():
            try:
                answers[node] = self._cluster.gather([ref], waiting_for=waiting_for, timeout=_ASK)[0]
            except DltrainError as error:
                generation.lost[node] = str(error)
        return answers

    def _hear(self, generation: Generation) -> None:
        """One round of polls: whatever the agents have to tell, waiting a fraction of a second for the first."""
        ray = untyped.ray()
        for node, agent in enumerate(self._cluster.agents):
            if node not in self._polls.values() and node not in generation.lost:
                self._polls[agent.poll.remote(_POLL)] = node
        ready, _ = ray.wait(list(self._polls), timeout=_POLL / 2)
        for ref in ready:
            node = self._polls.pop(ref)
            try:
                report: AgentReport = ray.get(ref)
            except ray.exceptions.RayError as error:
                generation.lost[node] = loss_of(error)
                continue
            self._heard[node] = time.monotonic()
            self._view.beats(node, report.beats)
            self._intake.watched.take(node, report.beats, time.monotonic())
            for event in report.events:
                if event.generation == generation.number:
                    self._intake.take(generation, self._cluster.nodes[node], event)
        for node, at in self._heard.items():
            if time.monotonic() - at > _SILENCE:
                generation.lost.setdefault(node, f"its agent has not answered for {_SILENCE:g} s")

    # ---- ending

    def _end(self, generation: Generation, decision: Decision) -> None:
        """See every rank of the generation to its end and take in the rest of its output."""
        generation.ending = True
        if self._cluster.broken():
            return  # the agents end with it, and their ranks with them
        self._view.phase("ending ranks")
        gentle = self._program.kind == "script" and decision.action in ("fail", "restart")
        if gentle:
            self._ask(generation, "signal", signal.SIGTERM, waiting_for="sending SIGTERM")
            self._drain(generation, min(5.0, self._recovery.stop_grace))
        if generation.alive():
            self._ask(generation, "signal", signal.SIGKILL, waiting_for="sending SIGKILL")
        if decision.action in ("fail", "restart"):  # else there was time to save, or there is to be none
            self._finish_saving(generation)
        self._ask(generation, "abandon_saves", waiting_for="ending what still saves")
        self._drain(generation, _DRAIN)
        self._ask(generation, "close_stores", waiting_for="closing the rendezvous store")

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

    def _write_report(self, generation: Generation, decision: Decision) -> None:
        action = "all ranks were started again" if decision.action == "restart" else "the run was ended"
        if decision.signum and "saved" in self._intake.last_words:
            action += f"; it goes on from step {self._intake.last_words['saved']}"
        standstill = generation.standstill
        logs = partial(self._intake.log_dir, generation)
        casualties = list(generation.casualties.values()) or blamed(standstill, logs)
        steps = [place.step for place in standstill.places] if standstill else [c.failure.step for c in casualties]
        report = Report(
            generation.number,
            decision,
            sorted(casualties, key=lambda casualty: casualty.failure.order),
            self._cluster.nodes,
            generation.lost,
            action,
            standstill,
            reached=max(0, self._metrics.last_step, *steps),
        )
        self._intake.reports.write(report, evidence=self._program.kind != "script")  # a script's output has been shown
