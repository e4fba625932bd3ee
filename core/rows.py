"""Metric rows: what each rank measured over some steps, and their reduction to one row of the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .tree import tree_sum

#: One rank's JSON-able record of the steps since its last one. Keys: ``step`` (completed optimizer steps), ``loss``
#: and ``norm`` (by part, of those trained in that step; the ranks' loss shares add up), ``loss_scale`` and
#: ``skipped_steps`` (by part, where losses are scaled), ``alone`` (whether the recipe has one part only), ``samples``,
#: ``steps``, ``seconds`` and ``wait`` (step time, and the part of it spent waiting for data), ``own`` (the part of it
#: before other ranks were waited for), ``evaluate`` and ``checkpoint`` (seconds between steps), ``at`` (Unix time),
#: ``lr``, ``epoch``, ``metrics`` (already reduced).
Row = dict[str, Any]


@dataclass(frozen=True)
class RunRow:
    """One row of the run, reduced over ranks.

    Attributes:
        step: completed optimizer steps.
        at: Unix time at which the last rank completed it.
        metrics: by name, such as ``train/loss``.
        steps: optimizer steps since the previous row.
        compute: seconds of those steps that were not spent waiting for data (the mean over ranks).
        wait: seconds of them spent waiting for data (the mean over ranks).
        own: by rank, seconds of them before it could wait for others.
        evaluate: seconds spent in evaluations since the previous row (the mean over ranks).
        checkpoint: seconds that training stood still for checkpoints since then (the mean over ranks).
    """

    step: int
    at: float
    metrics: dict[str, float]
    steps: int
    compute: float
    wait: float
    own: tuple[float, ...] = ()
    evaluate: float = 0.0
    checkpoint: float = 0.0

    @property
    def straggle(self) -> float:
        """Seconds of ``compute`` that ranks waited for the slowest (the mean over ranks)."""
        return min(max(self.own) - sum(self.own) / len(self.own), self.compute) if self.own else 0.0


def reduce_rows(rows: list[Row]) -> RunRow:
    """Reduce one step's rows, in rank order, to the run's row. Losses add up along a tree: the same bits every time."""
    first = rows[0]
    slowest = max(row["seconds"] for row in rows)
    metrics: dict[str, float] = {}
    for part in first["loss"]:
        metrics[_name(first, part, "loss")] = tree_sum([float(row["loss"][part]) for row in rows])
    for part, norm in first["norm"].items():
        metrics[_name(first, part, "grad_norm")] = norm
    for figure in ("loss_scale", "skipped_steps"):
        for part, value in first[figure].items():
            metrics[_name(first, part, figure)] = value
    metrics["train/lr"] = first["lr"]
    metrics["train/epoch"] = first["epoch"]
    metrics["train/samples_per_second"] = first["samples"] / slowest if slowest > 0 else 0.0
    metrics["train/step_seconds"] = slowest / first["steps"]
    metrics["train/data_seconds"] = max(row["wait"] for row in rows) / first["steps"]
    for row in rows:
        metrics.update(row["metrics"])
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("seconds", "wait", "evaluate", "checkpoint")}
    return RunRow(
        first["step"],
        max(row["at"] for row in rows),
        metrics,
        first["steps"],
        compute=mean["seconds"] - mean["wait"],
        wait=mean["wait"],
        own=tuple(row["own"] for row in rows),
        evaluate=mean["evaluate"],
        checkpoint=mean["checkpoint"],
    )


def _name(row: Row, part: str, figure: str) -> str:
    return f"train/{figure}" if row["alone"] else f"train/{part}/{figure}"


def unbroken(rows: Iterable[RunRow], after: int) -> list[RunRow]:
    """Those of ``rows`` that follow each other from step ``after`` on: none behind a row that is missing."""
    found: list[RunRow] = []
    for row in sorted(rows, key=lambda row: row.step):
        if row.step - row.steps > after:
            break
        found.append(row)
        after = row.step
    return found


@dataclass
class RowReducer:
    """Collects the rows of ``world`` ranks and gives out each step once all ranks have it, in order of steps."""

    world: int
    _waiting: dict[int, dict[int, Row]] = field(default_factory=dict[int, dict[int, Row]])

    def add(self, rank: int, rows: Iterable[Row]) -> list[RunRow]:
        """Take over a rank's rows; the run's rows that are now complete."""
        complete: list[RunRow] = []
        for row in rows:
            ranks = self._waiting.setdefault(row["step"], {})
            ranks[rank] = row
            if len(ranks) == self.world:
                del self._waiting[row["step"]]
                complete.append(reduce_rows([ranks[r] for r in range(self.world)]))
        return sorted(complete, key=lambda row: row.step)
