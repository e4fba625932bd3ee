"""The failure reports of one launch: written at the failure, completed once it is known what it cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..core.errors import RunFailed
from ..core.rows import RunRow
from .failure import Cost, Report
from .metrics import Metrics
from .rundir import RunDir
from .view import View


class FailureReports:
    """Keeps ``failures/<generation>.txt`` and ``.json`` of the run directory, and shows them."""

    def __init__(self, run: RunDir, view: View, metrics: Metrics) -> None:
        self._run, self._view, self._metrics = run, view, metrics
        self._checkpoint: int | None = None
        self._start: int | None = None
        self._origin = ""
        self._open: Report | None = None
        self.newest: Path | None = None
        self.costs: list[Cost] = []

    @property
    def where(self) -> str:
        """Where the newest report lies, in words; empty where it could not be kept."""
        return f"report: {self.newest}" if self.newest else ""

    def write(self, report: Report, *, evidence: bool) -> None:
        """Keep and show a failure.

        Args:
            evidence: show tracebacks and output too.
        """
        report = replace(report, checkpoint=self._checkpoint)
        text = report.text(evidence=evidence)
        self._view.note(text)
        self._metrics.alert(report.headline(), text, report.level())
        try:
            self._put(report)
        except RunFailed as error:  # what it is about has been said, and decides what comes of the run
            self.newest = None
            self._view.note(f"the report could not be kept: {error}")
        self._start = None
        self._open = report if report.decision.action == "restart" else None

    def started(self, step: int, origin: str, memory: str) -> None:
        """Ranks begin after ``step`` steps: from "memory", "storage", or, where it is empty, from nothing.

        Args:
            memory: whose, in words.
        """
        if self._start is None:
            self._start = step
            words = {"memory": memory, "storage": "the newest checkpoint", "": ""}
            self._origin = words[origin]
        if origin != "memory":
            self._checkpoint = step or None

    def saved(self, step: int) -> None:
        """There is a checkpoint after ``step`` steps."""
        self._checkpoint = step

    def row(self, row: RunRow) -> None:
        """A row of metrics: the first beyond what had been reached ends the failure before it."""
        if self._open is None or row.step <= self._open.reached:
            return
        report = self._open
        self._open = None
        start = self._start or 0
        cost = Cost(start, self._origin, max(0, report.reached - start), max(0.0, row.at - report.at))
        self.costs.append(cost)
        back = f"went on {cost.source} after {cost.seconds:.1f} s, with {cost.again}"
        try:
            self._view.note(f"{back}: {self._put(replace(report, cost=cost))}")
        except RunFailed as error:  # a report is not worth the run that it is about
            self._view.note(f"{back}; the report could not be completed: {error}")

    def _put(self, report: Report) -> Path:
        stem = f"failures/{report.generation:04d}"
        self._run.write(f"{stem}.txt", report.text())
        self._run.write(f"{stem}.json", report.json())
        self.newest = self._run.path / f"{stem}.txt"
        return self.newest
