"""What a new generation of ranks goes on from: found among the snapshots in the nodes' memory, if it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .generation import Generation
from .intake import Intake
from .messages import HeldImage, Point
from .metrics import Metrics
from .points import complete_points, in_place, newest_row

#: Calls a method of every agent that is there, with arguments; the answers by node.
Ask = Callable[..., dict[int, Any]]


@dataclass(frozen=True)
class Origin:
    """What a generation goes on from.

    Attributes:
        point: a snapshot in memory; None for the newest checkpoint, or the beginning.
        interrupted: a checkpoint was given up that was being written.
    """

    point: Point | None = None
    interrupted: bool = False

    def __str__(self) -> str:
        return f" from step {self.point.step}, in the memory of {self.point.world} ranks" if self.point else ""


class Recall:
    """Asks the agents what they hold.

    Args:
        nproc: ranks per node.
    """

    def __init__(self, intake: Intake, metrics: Metrics, *, nproc: int) -> None:
        self._intake, self._metrics, self._nproc = intake, metrics, nproc

    def find(self, generation: Generation, ask: Ask) -> Point | None:
        """The newest snapshot in memory that ranks can go on from, after ``generation`` has ended; None where the
        newest checkpoint is newer, or there is none.

        It counts only with all rows of metrics before it: those that its ranks had not sent yet lie beside it.
        """
        if generation.point is not None and not generation.begun and not _killed(generation):
            return None  # what it was to go on from is of no use
        held: dict[int, list[HeldImage]] = ask("snapshots", waiting_for="asking for snapshots in memory")
        ranks = {node: range(node * self._nproc, (node + 1) * self._nproc) for node in held}
        for point in complete_points(held):
            if point.step < self._intake.saved:
                return None
            if not in_place(point, held, ranks):
                continue
            rows: dict[int, Mapping[int, Any]] = ask("rows", point, waiting_for="asking for rows of metrics")
            self._intake.recover(generation, point, rows.values())
            if self._metrics.last_step >= newest_row(point, held):
                return point
        return None


def _killed(generation: Generation) -> bool:
    """Whether a rank was taken from outside before it could begin."""
    return bool(generation.lost) or any(casualty.failure.abrupt for casualty in generation.casualties.values())
