"""A run's metrics on their way out: the journal first, everything else fed from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from ..core.errors import RunFailed
from ..core.job import TrackingSpec
from ..core.rows import RunRow
from ..tracking.alerts import Level, raise_alert
from ..tracking.journal import Journal
from ..tracking.journal import Row as JournalRow
from ..tracking.outcome import Outcome
from ..tracking.tensorboard import TensorBoardPump
from ..tracking.wandb import WandbPump
from ..tracking.wandb_feed import SUMMARY
from .rundir import RunDir


class Metrics:
    """Owns the journal and its pumps. No method waits for a tracker, except :meth:`finish` with its deadline."""

    def __init__(
        self, run: RunDir, spec: TrackingSpec, *, config: Mapping[str, Any], on_message: Callable[[str], None]
    ) -> None:
        self._run = run
        path = run.path / "metrics.jsonl"
        self._journal = Journal(path, on_message=on_message)
        self.wandb = WandbPump(
            path,
            run.path,
            spec.wandb,
            run_id=run.record.id,
            name=f"{run.record.name}-{run.number}",
            config=config,
            on_message=on_message,
        )
        self._on_message = on_message
        self._tensorboard = TensorBoardPump(path, run.path, on_message=on_message) if spec.tensorboard else None

    @property
    def last_step(self) -> int:
        return self._journal.last_step

    def row(self, row: RunRow) -> None:
        self._journal.extend([JournalRow(row.step, row.at, row.metrics)])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._journal.append(step, metrics)

    def settled(self, step: int) -> bool:
        """Whether every row up to ``step`` has come, and is on the disk now."""
        return self._journal.last_step >= step and self._journal.flush()

    def tick(self) -> None:
        """Call now and then: makes what has come so far durable, at most once a second."""
        self._journal.flush(min_interval=1.0)

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Keep what trackers show of a whole run, for when they finish. On a full disk they do without."""
        with contextlib.suppress(RunFailed):
            self._run.write(SUMMARY, json.dumps(figures, indent=2) + "\n")

    def alert(self, title: str, text: str, level: Level) -> None:
        """Have the trackers tell people of something at once."""
        raise_alert(self._run.path, title, text, level)

    def finish(self, timeout: float, *, failed: bool, give_up: Callable[[], bool]) -> Outcome:
        """Close the journal and give the trackers ``timeout`` seconds to deliver the rest; how W&B ended.

        ``give_up`` is asked several times a second; true ends the wait.
        """
        self._journal.close()
        if self._tensorboard is not None:
            outcome = self._tensorboard.finish(timeout)
            if outcome.state == "incomplete":
                self._on_message(outcome.message)
        return self.wandb.finish(timeout, failed=failed, give_up=give_up)
