"""Carrying out a run: what job and script launches share, from the placed nodes to the finished trackers."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core.errors import Interrupted, JobError, RunFailed
from ..core.job import TrackingSpec
from ..core.processes import Driver
from ..core.recovery import RecoverySpec
from ..tracking.outcome import Outcome
from ..tracking.report import write_report
from .controller import Controller, Ending
from .failure import Cost
from .generation import Program
from .goodput import Goodput
from .interrupt import StopRequests
from .live import Live
from .messages import NodeInfo
from .metrics import Metrics
from .policy import Action
from .roster import Roster
from .rundir import RunDir, State, describe_environment
from .session import Session
from .view import View, duration

_TRACKER_TIMEOUT = 60.0
_STATES: dict[Action, State] = {"finish": "finished", "stopped": "stopped"}


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        status: "finished"; "stopped" when it was asked to stop and can be resumed; "failed".
        run_dir: its folder.
        step: completed optimizer steps (0 for a script).
        metrics: the last evaluation, such as ``test/accuracy``.
        goodput: share of the wall time spent in optimizer steps, in [0, 1].
        seconds: where the wall time went.
        tracking: how Weights & Biases ended.
        restarts: how often the ranks were started again.
        checkpoints: what each checkpoint has cost: ``stall_seconds`` that training waited, ``durable_seconds`` until it
            was complete, ``bytes`` of its tensors.
        costs: what each failure cost that the run went on after.
        slow: ranks that were notably slower than the others, in words.
    """

    status: Literal["finished", "stopped", "failed"]
    run_dir: Path
    step: int
    metrics: Mapping[str, float]
    goodput: float
    seconds: Mapping[str, float]
    tracking: Outcome
    restarts: int = 0
    checkpoints: Sequence[Mapping[str, float]] = ()
    costs: tuple[Cost, ...] = ()
    slow: tuple[str, ...] = ()


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Work:
    """A run to carry out.

    Attributes:
        config: what the trackers show as the run's configuration.
        facts: the head of the run's report.
        logs: folder for the ranks' logs.
        again: what goes on with the run once it was stopped, in words.
        after: called when the program has finished.
        fence: called with the number of a generation, before it starts, when an older one may still be alive somewhere.
    """

    run: RunDir
    program: Program
    recovery: RecoverySpec
    tracking: TrackingSpec
    config: Mapping[str, Any]
    logs: Path
    facts: dict[str, str] = field(default_factory=dict[str, str])
    again: str = "the same command"
    after: Callable[[], None] = _nothing
    fence: Callable[[int], None] = _nothing


def carry_out(work: Work, session: Session, view: View, stop: StopRequests, goodput: Goodput) -> RunResult:
    """Run the program on the placed nodes to its end, and finish the run directory, whatever happens on the way.

    Raises:
        JobError: the request turned out wrong before ranks trained.
        RunFailed: the run failed.
        Interrupted: it was asked to stop.
    """
    run = work.run
    layout = (*run.record.ranks_per_node, (run.record.generations, session.demand.ranks))
    run.update(
        state="running",
        command=tuple(sys.argv),
        driver=Driver.here(),
        logs=str(work.logs),
        ranks_per_node=layout,
        submission=session.options.submission,
    )
    view = Live(view, run, goodput, stop, stop_grace=work.recovery.stop_grace)
    metrics = Metrics(run, work.tracking, config=work.config, on_message=view.note)
    try:
        session.adopt(run, work.logs)
        ending = _drive(work, session, view, stop, goodput, metrics)
        if ending.decision.action == "finish":
            work.after()
    except BaseException as error:
        state: State = "stopped" if isinstance(error, Interrupted) else "failed"
        _finish(work, metrics, state, None, goodput, view, stop)
        raise
    result = _finish(work, metrics, _STATES.get(ending.decision.action, "failed"), ending, goodput, view, stop)
    _raise_unless_finished(ending, work, stop)
    return result


def _finish(
    work: Work,
    metrics: Metrics,
    state: State,
    ending: Ending | None,
    goodput: Goodput,
    view: Live,
    stop: StopRequests,
) -> RunResult:
    """Give the trackers their last chance, until the user has had enough, and complete the run directory."""
    run = work.run
    view.phase("finishing the trackers")
    metrics.summarize(_summary(goodput, ending.restarts if ending else 0))
    enough = min(stop.count + 1, 2)
    outcome = metrics.finish(_TRACKER_TIMEOUT, failed=state == "failed", give_up=lambda: stop.count >= enough)
    if outcome.state == "incomplete":
        view.note(outcome.message)
    view.close()
    run.update(state=state)
    result = _result(state, run, ending, goodput, outcome)
    if metrics.last_step >= 0:
        try:
            write_report(run.path, title=f"{run.record.name} {run.number}", facts=work.facts | _facts(result))
        except OSError as error:  # whatever the run came to, its curves do not change it
            view.note(f"report.html cannot be written: {error.strerror or error}")
    return result


def _drive(work: Work, session: Session, view: View, stop: StopRequests, goodput: Goodput, metrics: Metrics) -> Ending:
    environment = describe_environment([])
    roster = Roster(session, enlist=lambda agent: session.enlist(agent, work.run, work.logs), say=view.note)

    def show_nodes(nodes: Sequence[NodeInfo]) -> None:
        hosts = [
            {
                "node": node.node,
                "hostname": node.hostname,
                "address": node.address,
                "cores": len(node.cores),
                "gpus": list(node.gpus),
                "agent": node.pid,
            }
            for node in nodes
        ]
        work.run.write("environment.json", json.dumps(environment | {"hosts": hosts}, indent=2) + "\n")
        view.nodes(nodes, session.demand.ranks)

    show_nodes(session.cluster.nodes)
    controller = Controller(
        session.cluster,
        work.program,
        run=work.run,
        nproc=session.demand.ranks,
        recovery=work.recovery,
        metrics=metrics,
        goodput=goodput,
        view=view,
        stop=stop,
        logs=work.logs,
        environ=session.environ,
        roster=roster,
        show_nodes=show_nodes,
        fence=work.fence,
        master_addr=session.options.master_addr,
        master_port=session.options.master_port,
    )
    with roster:
        return controller.run()


def _raise_unless_finished(ending: Ending, work: Work, stop: StopRequests) -> None:
    decision = ending.decision
    match decision.action:
        case "refuse":
            raise JobError(*dict.fromkeys(ending.refused))  # ranks refuse alike
        case "fail":
            raise RunFailed(decision.reason, report=str(ending.report or ""))
        case "stopped":
            step = ending.said.get("saved")
            words = decision.reason or "stopped as asked"
            saved = f"; {work.again} goes on from step {step}" if step is not None else ""
            signum = stop.signum or decision.signum or signal.SIGINT
            raise Interrupted(f"{words}{saved}: {work.run.path}", signum=signum)
        case _:
            return


def _result(state: State, run: RunDir, ending: Ending | None, goodput: Goodput, outcome: Outcome) -> RunResult:
    assert state != "running"
    now = time.time()
    said = ending.said if ending else {}
    return RunResult(
        status=state,
        run_dir=run.path,
        step=said.get("step", 0),
        metrics=said.get("metrics", {}),
        goodput=goodput.ratio(now),
        seconds=goodput.shares(now),
        tracking=outcome,
        restarts=ending.restarts if ending else 0,
        checkpoints=said.get("costs", ()),
        costs=ending.costs if ending else (),
        slow=goodput.stragglers.words(run.record.ranks_per_node[-1][1]),
    )


def _summary(goodput: Goodput, restarts: int) -> dict[str, float]:
    """What the trackers keep of a run beside its metrics."""
    now = time.time()
    seconds = {f"seconds/{name.replace(' ', '_')}": seconds for name, seconds in goodput.shares(now).items()}
    slow = {f"slow/rank_{rank}": slower for rank, slower in goodput.stragglers.found().items()}
    return {"goodput": goodput.ratio(now), **seconds, "restarts": restarts, **slow}


def _facts(result: RunResult) -> dict[str, str]:
    return {
        "status": result.status,
        "steps": str(result.step),
        **{name: f"{value:.4g}" for name, value in result.metrics.items()},
        "goodput": f"{result.goodput:.0%}",
        **{f"time: {name}": duration(seconds) for name, seconds in result.seconds.items()},
        **({"slow ranks": "; ".join(result.slow)} if result.slow else {}),
        "W&B": result.tracking.url or result.tracking.command or result.tracking.state,
    }
