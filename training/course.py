"""What evaluations decide about the rest of a run: when the learning rate falls, and when to end early."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, Literal

from ..core.errors import JobError, Problem
from ..core.job import CheckpointSpec
from ..core.train import TrainSpec


class Watch:
    """The best value of a metric so far, and how many evaluations ago it was.

    Attributes:
        where: the job's key that names the metric.
    """

    def __init__(
        self, metric: str, goal: Literal["min", "max"], *, where: str, patience: int, min_delta: float = 0.0
    ) -> None:
        self.where = where
        self._metric = metric
        self._sign = 1.0 if goal == "min" else -1.0
        self._patience, self._min_delta = patience, min_delta
        self._best: float | None = None
        self._since = 0

    def worn(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metric has not improved for ``patience`` evaluations, this one counted; the count begins anew.

        Raises:
            JobError: there is no such metric among ``metrics``.
        """
        if self._metric not in metrics:
            known = ", ".join(sorted(metrics)) or "there are none"
            raise JobError(Problem(f"no metric '{self._metric}' is evaluated", self.where, f"known: {known}"))
        value = self._sign * metrics[self._metric]
        if not math.isnan(value) and (self._best is None or value < self._best - self._min_delta):
            self._best, self._since = value, 0
            return False
        self._since += 1
        if self._since < self._patience:
            return False
        self._since = 0
        return True

    @property
    def fresh(self) -> bool:
        """Whether the last evaluation was the best so far."""
        return self._best is not None and self._since == 0

    def state(self) -> dict[str, Any]:
        return {"metric": self._metric, "sign": self._sign, "best": self._best, "since": self._since}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's, unless that is of another metric or goal."""
        if (state["metric"], state["sign"]) == (self._metric, self._sign):
            self._best, self._since = state["best"], state["since"]


class Course:
    """The same decisions on every rank, since every rank has the same metrics.

    Attributes:
        falls: how often the schedule 'plateau' has lowered the learning rate.
        ended: whether training is to end now.
        best: whether the last evaluation was the best so far by what is to be kept.
    """

    def __init__(self, train: TrainSpec, checkpoint: CheckpointSpec) -> None:
        self.falls = 0
        self.ended = False
        self.best = False
        schedule, stop = train.schedule, train.early_stop
        self._plateau: Watch | None = None
        self._stop: Watch | None = None
        self._kept: Watch | None = None
        if schedule.name == "plateau":
            self._plateau = Watch(
                schedule.metric, schedule.goal, where="train.schedule.metric", patience=schedule.patience
            )
        if stop.patience is not None:
            where = "train.early_stop.metric"
            self._stop = Watch(stop.metric, stop.goal, where=where, patience=stop.patience, min_delta=stop.min_delta)
        if checkpoint.keep_best is not None:
            where, goal = "checkpoint.keep_best", checkpoint.keep_best_goal
            self._kept = Watch(checkpoint.keep_best, goal, where=where, patience=sys.maxsize)

    def take(self, metrics: Mapping[str, float]) -> None:
        """Consider an evaluation.

        Raises:
            JobError: a metric that is watched is not among ``metrics``.
        """
        if self._plateau is not None and self._plateau.worn(metrics):
            self.falls += 1
        if self._stop is not None and self._stop.worn(metrics):
            self.ended = True
        if self._kept is not None:
            self._kept.worn(metrics)
            self.best = self._kept.fresh

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON-able."""
        return {"falls": self.falls, "watches": {watch.where: watch.state() for watch in self._watches()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's; a watch that it does not know begins anew."""
        self.falls = state.get("falls", 0)
        found = state.get("watches", {})
        for watch in self._watches():
            if watch.where in found:
                watch.load(found[watch.where])

    def _watches(self) -> list[Watch]:
        return [watch for watch in (self._plateau, self._stop, self._kept) if watch is not None]
