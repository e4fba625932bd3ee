"""Stalls: when a rank's standing still is one, and who causes it. No Ray, no clock of its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..core.pulse import PHASES
from ..core.rows import RunRow
from .messages import RankBeat
from .policy import RankFailure, Stall
from .stacks import Look

_FLOOR = 120.0  # a recompilation, a storage that tries again: what passes by itself is not to end a run
_TIMES_STEP = 10.0
_TIMES_LONGEST = 3.0
_WARM = 2  # steps after which nothing is compiled or allocated for the first time
_GLANCE = 1.0  # most that counts between two looks: when the observer itself was held up, ranks may have been too

_STEP = ("data", "forward", "backward", "optimizer")
_BETWEEN = ("evaluate", "checkpoint")


@dataclass(frozen=True)
class Place:
    """Where a rank is, for how many seconds it has been seen there, and after how many that is a stall."""

    rank: int
    node: int
    step: int
    phase: str
    still: float
    limit: float

    @property
    def order(self) -> tuple[int, int]:
        """Sorts ranks by how far they have come."""
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"{self.phase}, step {self.step}" if self.step >= 0 else f"{self.phase}, before the first step"


@dataclass
class _Seen:
    node: int
    beat: RankBeat
    at: float
    first_step: int = -1
    still: float = 0.0
    longest: dict[str, float] = field(default_factory=dict[str, float])
    """By phase between steps, the longest time that it stood still there and then went on."""
    passed: set[str] = field(default_factory=set[str])
    """Phases between steps that it has come through."""


class StallWatch:
    """Watches the beats of one generation's ranks.

    Only time is counted in which the beats were looked at, so a machine that was suspended, or a controller that got no
    core, makes no stall. Limits hold from the third step of a start on, since the first may compile. Evaluation and
    checkpoints have one once a rank has come through the first: three times the longest, if that is more.

    Args:
        limit: seconds, "auto" or "never".
    """

    def __init__(self, limit: float | Literal["auto", "never"]) -> None:
        self._limit: float | Literal["auto"] = math.inf if limit == "never" else limit
        self._steps: deque[float] = deque(maxlen=200)
        self._ranks: dict[int, _Seen] = {}

    def row(self, row: RunRow) -> None:
        """Learn how long steps take."""
        self._steps.append(row.metrics.get("train/step_seconds", 0.0))

    def take(self, node: int, beats: Sequence[RankBeat], now: float) -> None:
        """Take in where a node's living ranks are at ``now``, by any clock that only runs forward."""
        for rank in [rank for rank, seen in self._ranks.items() if seen.node == node]:
            if all(beat.rank != rank for beat in beats):
                del self._ranks[rank]  # it has ended
        for beat in beats:
            seen = self._ranks.get(beat.rank)
            if seen is None or beat.step < seen.beat.step:  # what came first was an older generation's last word
                seen = self._ranks[beat.rank] = _Seen(node, beat, now)
            before = seen.beat
            moved = (beat.step, beat.phase) != (before.step, before.phase) or beat.age < before.age
            if moved and before.phase in _BETWEEN:
                seen.longest[before.phase] = max(seen.longest.get(before.phase, 0.0), before.age)
                seen.passed |= {before.phase} - {beat.phase}
            seen.still = 0.0 if moved else seen.still + min(now - seen.at, _GLANCE)
            if seen.first_step < 0:
                seen.first_step = beat.step
            seen.beat, seen.at = beat, now

    def places(self) -> list[Place]:
        """Where the living ranks are."""
        return [
            Place(rank, seen.node, seen.beat.step, seen.beat.phase, seen.still, self._limit_of(seen))
            for rank, seen in sorted(self._ranks.items())
        ]

    def _limit_of(self, seen: _Seen) -> float:
        if seen.first_step < 0 or seen.beat.step < seen.first_step + _WARM:
            return math.inf
        slow = _TIMES_STEP * max(self._steps, default=0.0)
        limit = max(_FLOOR, slow) if self._limit == "auto" else self._limit
        if seen.beat.phase in _STEP:
            return limit
        if seen.beat.phase in seen.passed:
            return max(limit, _TIMES_LONGEST * seen.longest[seen.beat.phase])
        return math.inf


def stalled(places: Iterable[Place]) -> list[Place]:
    """The ranks that hold up all others, if there is a stall: those furthest behind, once all of them stand still.

    A rank that waits for another is ahead of it, or beside it. As long as one of the hindmost moves, there is progress.
    """
    places = list(places)
    least = min((place.order for place in places), default=None)
    hindmost = [place for place in places if place.order == least]
    return hindmost if all(place.still > place.limit for place in hindmost) else []


@dataclass(frozen=True)
class Standstill:
    """A stall with its evidence: where all living ranks were, and what was seen of their processes."""

    stall: Stall
    places: Sequence[Place]
    looks: Mapping[int, Look]


def tell_stall(places: Sequence[Place], looks: Mapping[int, Look], now: float) -> Standstill:
    """Who causes a stall, and who only waits.

    A stopped process does, for certain. Else it is those of the hindmost whose stack is in no collective. If all of
    them wait in one, they are to blame while others are ahead; ranks that all wait in one place wait for each other.

    Args:
        places: of all living ranks.
        looks: at as many of them as could be looked at.
        now: Unix time in seconds.
    """
    hindmost = stalled(places)
    stopped = [place for place in places if place.rank in looks and looks[place.rank].stopped]
    awake = [place for place in hindmost if place.rank in looks and looks[place.rank].stacks]
    busy = [place for place in awake if not looks[place.rank].waits]
    culprits = stopped or busy or (hindmost if len(hindmost) < len(places) or len(places) == 1 else [])
    failures = tuple(_failure(place, looks.get(place.rank), now) for place in culprits)
    return Standstill(Stall(max(place.still for place in hindmost), str(hindmost[0]), failures), places, looks)


def _failure(place: Place, look: Look | None, now: float) -> RankFailure:
    stopped = look is not None and look.stopped
    return RankFailure(
        place.rank,
        place.node,
        now - place.still,
        "stall",
        look.why_silent() if look is not None and not look.stacks else f"no progress in {place.phase}",
        step=place.step,
        phase=place.phase,
        abrupt=stopped,
    )
