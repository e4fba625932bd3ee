"""Slow ranks: told from the others by the time that each takes before it has to wait for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from ..core.rows import RunRow

_NOTABLE = 0.1  # of the median
_FEWEST_STEPS = 50


@dataclass
class Stragglers:
    """Adds up each rank's own time over the steps of a launch. It begins anew where the number of ranks changes."""

    _own: list[float] = field(default_factory=list[float])
    _steps: int = 0

    def take(self, row: RunRow) -> None:
        """Count a row."""
        if len(row.own) != len(self._own):
            self._own, self._steps = [0.0] * len(row.own), 0
        self._own = [before + own for before, own in zip(self._own, row.own, strict=True)]
        self._steps += row.steps

    def found(self) -> dict[int, float]:
        """Ranks that are notably slower than the median, the slowest first: by how much, as a share of it."""
        if self._steps < _FEWEST_STEPS or len(self._own) < 2 or not (middle := median(self._own)):
            return {}
        slower = {rank: own / middle - 1 for rank, own in enumerate(self._own) if own > (1 + _NOTABLE) * middle}
        return dict(sorted(slower.items(), key=lambda item: -item[1]))

    def words(self, ranks_per_node: int) -> tuple[str, ...]:
        """The same for people."""
        return tuple(
            f"rank {rank} on node {rank // ranks_per_node}: {slower:.0%} slower than the median"
            for rank, slower in self.found().items()
        )
