"""Which checkpoints stay. One process of a run calls these, between its saves. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..core.errors import JobError
from ..core.storage import Storage
from .manifest import MANIFEST, CorruptCheckpoint, folder_name, folder_step
from .reader import catalogue, open_manifest

EVALUATED = "evaluated"
"""Key of a manifest's ``extra`` with the metrics that were evaluated at its step, by name."""

_ASIDE = "set-aside.json"


@dataclass
class Best:
    """Which checkpoint is the best by a metric. It remembers what it has read.

    Args:
        metric: name of the metric; none is best where that is None.
        goal: whether it is better when lower ('min') or higher ('max').
    """

    metric: str | None
    goal: Literal["min", "max"]
    _values: dict[int, float] = field(default_factory=dict[int, float])

    def among(self, storage: Storage, steps: Sequence[int]) -> int | None:
        """The best of these complete checkpoints, the newest of equals; None where none was evaluated at its step."""
        if self.metric is None:
            return None
        for step in steps:
            if step not in self._values:
                self._values[step] = self._read(storage, step)
        sign = -1.0 if self.goal == "min" else 1.0
        rated = [(sign * self._values[step], step) for step in steps if math.isfinite(self._values[step])]
        return max(rated)[1] if rated else None

    def _read(self, storage: Storage, step: int) -> float:
        try:
            evaluated = open_manifest(storage, step).extra.get(EVALUATED)
        except (CorruptCheckpoint, JobError):
            return math.nan
        value = evaluated.get(self.metric or "") if isinstance(evaluated, dict) else None
        return float(value) if isinstance(value, int | float) else math.nan


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a checkpoint can be rated by."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def prune(storage: Storage, keep: int, best: Best | None = None) -> list[int]:
    """Remove all but the newest ``keep`` complete checkpoints and the best, and what older saves left half-written.

    A manifest goes before its shards, so that what a killed removal leaves is no checkpoint. Half-written folders
    newer than the newest complete one may be a save in progress, and stay.

    Returns:
        the steps of the folders that were removed, newest first.
    """
    if keep < 1:
        raise ValueError(f"at least one checkpoint is kept, not {keep}")
    complete = [entry.step for entry in catalogue(storage)]
    if not complete:
        return []
    kept = {*complete[:keep], best.among(storage, complete) if best is not None else None}
    steps = {step for name in storage.folders() if (step := folder_step(name)) is not None}
    stale = sorted((step for step in steps | set(complete) if step < complete[0] and step not in kept), reverse=True)
    for step in stale:
        storage.remove(f"{folder_name(step)}/{MANIFEST}")
        storage.remove_tree(folder_name(step))
    return stale


def set_aside(storage: Storage, *, after: int) -> list[int]:
    """Take every checkpoint newer than step ``after`` out of the catalogue, since the run goes on from ``after``.

    They proved corrupt, or belong to a history that was left. If they stayed, they would be "the newest" again, and
    :func:`prune` would prefer them to what is saved next. Nothing is deleted: the manifest is renamed, and
    :func:`prune` removes the folder once a newer checkpoint is complete.

    Returns:
        the steps that were set aside, newest first.
    """
    steps = [entry.step for entry in catalogue(storage) if entry.step > after]
    for step in steps:
        name = f"{folder_name(step)}/{MANIFEST}"
        storage.write(f"{folder_name(step)}/{_ASIDE}", [storage.read(name)])
        storage.remove(name)
    return steps
