"""What the controller makes of the news of a generation's ranks: rows, words, output, exits."""

from __future__ import annotations

import time
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import Problem
from ..core.rows import Row, RowReducer, RunRow, unbroken
from ..tracking.samples import keep
from .failure import Casualty, Report, blamed, casualty_of
from .generation import Generation
from .goodput import Goodput
from .messages import NodeInfo, Point, RankEvent
from .metrics import Metrics
from .policy import Decision, RankFailure
from .reports import FailureReports
from .rundir import RunDir
from .stall import StallWatch
from .view import View


class Intake:
    """Takes in the events of one generation after the other, and hands each to whom it concerns.

    Args:
        speaks: ranks say when they are done and why they fail; a script's do not.
        remedies: what would let ranks hold less memory.

    Attributes:
        watched: how the ranks of the generation get on.
        last_words: what rank 0 said at the end, the step of the newest checkpoint that is complete, and what each has
            cost.
        saved: step of the run's newest checkpoint, as far as this launch knows; -1 before.
        settling: the step up to which rank 0's persister wants metrics to be on the disk; None when it waits for none.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        metrics: Metrics,
        goodput: Goodput,
        view: View,
        logs: Path,
        speaks: bool,
        remedies: Sequence[str] = (),
    ) -> None:
        self._run, self._logs, self._speaks, self._remedies = run, logs, speaks, remedies
        self._metrics, self._goodput, self._view = metrics, goodput, view
        self.reports = FailureReports(run, view, metrics)
        self.last_words: dict[str, Any] = {}
        self.saved = -1
        self.settling: int | None = None
        self.watched = StallWatch("never")
        self._reducer = RowReducer(0)
        self._troubled = -1

    def begin(self, world: int, watched: StallWatch) -> None:
        """A generation of ``world`` ranks is about to speak."""
        self._reducer = RowReducer(world)
        self.watched = watched

    def take(self, generation: Generation, node: NodeInfo, event: RankEvent) -> None:
        """One thing that happened on ``node`` to a rank of ``generation``."""
        match event.kind:
            case "started":
                generation.started.add(event.rank)
            case "message":
                self._take_message(generation, event.rank, event.data)
            case "log":
                self._take_output(generation, node, event)
            case "exit":
                self._take_exit(generation, node, event)
            case "closed":
                generation.closed.add(event.rank)

    def _take_message(self, generation: Generation, rank: int, message: dict[str, Any]) -> None:
        match message["t"]:
            case "rows":
                self._take_rows(self._reducer.add(rank, message["rows"]))
            case "log":
                self._metrics.log(message["step"], message["metrics"])
            case "setup":
                generation.begun = True
                generation.step = max(generation.step, message["start"])
                if message["origin"] != "memory":
                    self.saved = message["start"] or -1
                self._view.setup(message)
                self.reports.started(message["start"], message["origin"], generation.memory)
            case "note":
                self._view.note(message["text"])
            case "settle":
                self.settling = message["step"]
            case "image":
                keep(self._run.path, step=message["step"], name=message["name"], png=b64decode(message["png"]))
            case "saved":
                self.saved = self.last_words["saved"] = message["step"]
                self.last_words.setdefault("costs", []).append(message["cost"])
                self._view.saved(message["step"], message["cost"])
                self.reports.saved(message["step"])
                if message["step"] >= self._troubled:  # what failed may have been given up for a newer one
                    self._untroubled()
            case "trouble":
                self._take_trouble(message)
            case "end":
                self._goodput.end(**message["spent"])
                self.last_words.update(message)
            case "done":
                generation.done.add(rank)
            case "preempted":
                generation.preempted[rank] = message["signal"]
                text = f"rank {rank} was sent {message['signal']}: all ranks save a checkpoint and end"
                self._view.note(text)
            case "refused":
                generation.refused += [Problem(**problem) for problem in message["problems"]]
            case "failed":
                generation.said[rank] = message
            case other:
                raise ValueError(f"rank {rank} sent a message of kind {other!r}")

    def reached(self, generation: Generation) -> int:
        """The newest step that ``generation`` or an earlier one has got to, as far as anything tells of it."""
        return generation.reached(self._metrics.last_step, self.saved, self.watched.newest)

    def _take_rows(self, rows: Iterable[RunRow]) -> None:
        for row in rows:
            self._goodput.take(row, again=row.step <= self._metrics.last_step)
            self._metrics.row(row)
            self._view.row(row)
            self.watched.row(row)
            self.reports.row(row)

    def recover(self, generation: Generation, point: Point, ranks: Mapping[int, list[Row]]) -> None:
        """Take in the rows that lie beside a snapshot, by rank, as far as they have not come yet.

        Args:
            generation: the last one; the snapshot may be of an earlier one.
        """
        reducer = self._reducer if point.generation == generation.number else RowReducer(point.world)
        last = self._metrics.last_step
        new = {rank: [row for row in rows if row["step"] > last] for rank, rows in ranks.items()}
        found = [row for rank, rows in new.items() for row in reducer.add(rank, rows)]
        self._take_rows(unbroken(found, last))  # what a lost node had not passed on is missing before them

    def _take_output(self, generation: Generation, node: NodeInfo, event: RankEvent) -> None:
        if event.rank not in generation.said:  # after a rank's last words its traceback is in the report
            self._view.output(event.rank, event.stream, event.text)
        if not node.shares_run_dir:
            path = self.log_dir(generation, event.rank) / f"{event.stream}.log"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(event.text)

    def _take_exit(self, generation: Generation, node: NodeInfo, event: RankEvent) -> None:
        assert event.exit is not None
        generation.exited.add(event.rank)
        if event.exit.ok and (event.rank in generation.done or not self._speaks):
            generation.ended.add(event.rank)
        elif not generation.ending:
            said = generation.said.get(event.rank)
            log_dir = self.log_dir(generation, event.rank)
            casualty = casualty_of(
                event.rank,
                node.node,
                event.exit,
                said,
                event.data,
                log_dir,
                speaks=self._speaks,
                remedies=self._remedies,
            )
            if generation.refused:
                refusal = RankFailure(
                    event.rank, node.node, event.exit.at, "JobError", str(generation.refused[0]), refused=True
                )
                casualty = Casualty(refusal, "", log_dir)
            generation.casualties[event.rank] = casualty

    def log_dir(self, generation: Generation, rank: int) -> Path:
        """Folder of a rank's logs."""
        return self._logs / f"attempt-{generation.number}" / f"rank-{rank}"

    def report(self, generation: Generation, decision: Decision, nodes: Sequence[NodeInfo], changed: str) -> Report:
        """What is to be told of a generation's failure.

        Args:
            nodes: those that it ran on.
            changed: which others come next, in words; or empty.
        """
        done = "all ranks were started again" if decision.action == "restart" else "the run was ended"
        if decision.signum and "saved" in self.last_words:
            done += f"; it goes on from step {self.last_words['saved']}"
        standstill = generation.standstill
        casualties = list(generation.casualties.values()) or blamed(standstill, partial(self.log_dir, generation))
        steps = [place.step for place in standstill.places] if standstill else [c.failure.step for c in casualties]
        return Report(
            generation.number,
            decision,
            sorted(casualties, key=lambda casualty: casualty.failure.order),
            nodes,
            generation.lost,
            "; ".join(filter(None, [changed, done])),
            standstill,
            reached=max(0, self._metrics.last_step, *steps),
            at=decision.culprit.at if decision.culprit else generation.lost_at or time.time(),
        )

    def _take_trouble(self, message: dict[str, Any]) -> None:
        """Say once that a checkpoint cannot be written, and that it can be again; ranks suffer alike."""
        step, why = message["step"], message["why"]
        if why and self._troubled < 0:
            self._troubled = step
            text = f"the checkpoint of step {step} cannot be written yet (rank {message['rank']}: {why})"
            self._view.note(f"{text}; it is kept in memory and tried again, and training goes on")
        elif not why:
            self._untroubled()

    def _untroubled(self) -> None:
        if self._troubled >= 0:
            self._troubled = -1
            self._view.note("checkpoints can be written again")
