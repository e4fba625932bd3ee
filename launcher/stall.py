"""Stalls: when a rank's standing still is one, and who causes it. No Ray, no clock of its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..core.pulse import PHASES
from ..core.rows import RunRow
from .messages import RankBeat
from .policy import RankFailure, Stall
from .stacks import Look

_NOTICE = 2.0
_NOTICE_TIMES = 3.0
_NOTICE_AT_START = 30.0
_STOPPED = 10.0  # a process that somebody has stopped for longer does not go on by itself
_FLOOR = 120.0  # a recompilation, a storage that tries again: what passes by itself is not to end a run
_TIMES_STEP = 10.0
_TIMES_LONGEST = 3.0
_WARM = 2  # steps after which nothing is compiled or allocated for the first time
_GLANCE = 1.0  # most that counts between two looks: when the observer itself was held up, ranks may have been too
_FRAMES = 3  # of a stack that the terminal shows; a report has all

_STEP = ("data", "forward", "backward", "optimizer")
_BETWEEN = ("evaluate", "checkpoint", "snapshot")


@dataclass(frozen=True)
class Place:
    """Where a rank is, for how many seconds it has been seen there, and after how many that is told, and a stall."""

    rank: int
    node: int
    step: int
    phase: str
    still: float
    limit: float
    notice: float = math.inf

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
    """By phase, the longest time that it stood still there and then went on; in its first steps, and between steps."""
    passed: set[str] = field(default_factory=set[str])
    """Phases between steps that it has come through."""

    @property
    def warm(self) -> bool:
        """Whether it is past the steps that may compile and allocate."""
        return 0 <= self.first_step <= self.beat.step - _WARM


class StallWatch:
    """Watches the beats of one generation's ranks.

    Only time is counted in which the beats were looked at, so a machine that was suspended, or a controller that got no
    core, makes no stall. ``limit`` holds from the third step of a start on, since the first may compile. Evaluation,
    checkpoints and snapshots have it once a rank has come through the first: or three times the longest, if that is
    more. Before, it is ``at_start``, or what follows from how long an earlier generation took there.

    Args:
        limit: seconds, "auto" or "never".
        at_start: seconds.
        before: what watched the generation before this one.

    Attributes:
        newest: the newest step that a rank has come to while it was watched; -1 before.
    """

    def __init__(
        self, limit: float | Literal["auto", "never"], at_start: float = math.inf, *, before: StallWatch | None = None
    ) -> None:
        self._limit: float | Literal["auto"] = math.inf if limit == "never" else limit
        self._at_start = math.inf if limit == "never" else at_start
        self._stopped: set[int] = set()
        self._told: dict[int, tuple[Place, float]] = {}
        self._steps: deque[float] = deque(before._steps if before else (), maxlen=200)
        self._known: dict[str, float] = dict(before._learnt) if before else {}
        self._learnt = dict(self._known)
        self._ranks: dict[int, _Seen] = {}
        self.newest = -1

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
            if moved:
                self.newest = max(self.newest, beat.step)
                self._stopped.discard(beat.rank)
                self._learn_pace(seen, beat)
            seen.still = 0.0 if moved else seen.still + min(now - seen.at, _GLANCE)
            if seen.first_step < 0:
                seen.first_step = beat.step
            seen.beat, seen.at = beat, now

    def _learn_pace(self, seen: _Seen, beat: RankBeat) -> None:
        """A rank has gone on to ``beat``: what it took, for later and for the next generation's first times."""
        phase, took = seen.beat.phase, seen.longest
        if phase in _BETWEEN or not seen.warm:
            took[phase] = max(took.get(phase, 0.0), seen.beat.age)
        if phase in _BETWEEN and phase != beat.phase:
            seen.passed.add(phase)
        for known in (*seen.passed, *(_STEP if seen.warm else ())):
            self._learnt[known] = max(self._learnt.get(known, 0.0), took.get(known, 0.0))

    def places(self) -> list[Place]:
        """Where the living ranks are."""
        return [
            Place(
                rank,
                seen.node,
                seen.beat.step,
                seen.beat.phase,
                seen.still,
                self._limit_of(seen),
                self._notice_of(seen),
            )
            for rank, seen in sorted(self._ranks.items())
        ]

    def held_up(self) -> list[Place]:
        """The ranks that hold up the others for longer than steps take, where that was not told yet.

        It is to be told again once they have stood still for twice as long.
        """
        hindmost = _behind(self.places(), lambda place: place.notice)
        if not hindmost:
            return []
        first = hindmost[0]
        told, still = self._told.get(first.rank, (None, 0.0))
        if told is not None and told.order == first.order and still <= first.still < 2 * still:
            return []
        self._told = {first.rank: (first, first.still)}
        return hindmost

    def learn(self, looks: Mapping[int, Look]) -> None:
        """Take in what the processes of ranks were seen to do."""
        self._stopped = {rank for rank, look in looks.items() if look.stopped}

    def still(self) -> dict[int, float]:
        """By node, for how many seconds the least still of its ranks has been seen in its place."""
        found: dict[int, float] = {}
        for seen in self._ranks.values():
            found[seen.node] = min(seen.still, found.get(seen.node, math.inf))
        return found

    def _limit_of(self, seen: _Seen) -> float:
        if seen.beat.phase == "user":
            return math.inf
        longest = self._longest(seen)
        if longest is None:
            return self._at_start
        if self._limit != "auto":
            limit = self._limit
        elif self._stopped:
            limit = max(_STOPPED, self._notice_of(seen))
        else:
            limit = max(_FLOOR, _TIMES_STEP * max(self._steps, default=0.0))
        limit = max(limit, _TIMES_LONGEST * longest)
        return limit if seen.warm else min(limit, self._at_start)

    def _notice_of(self, seen: _Seen) -> float:
        if seen.beat.phase == "user":
            return math.inf
        longest = self._longest(seen)
        if longest is None:
            return _NOTICE_AT_START
        slow = sorted(self._steps)[math.ceil(0.99 * len(self._steps)) - 1] if self._steps else 0.0
        return max(_NOTICE, _NOTICE_TIMES * max(slow, longest))

    def _longest(self, seen: _Seen) -> float | None:
        """The longest time that ranks stood where it is, over what other steps tell; None where that is not known."""
        phase = seen.beat.phase
        if seen.warm and phase in _STEP:
            return 0.0
        if seen.warm and phase in seen.passed:
            return seen.longest[phase]
        return self._known.get(phase) if seen.beat.step >= 0 else None


def stalled(places: Iterable[Place]) -> list[Place]:
    """The ranks that hold up all others, if there is a stall: those furthest behind, once all of them stand still.

    A rank that waits for another is ahead of it, or beside it. As long as one of the hindmost moves, there is progress.
    """
    return _behind(places, lambda place: place.limit)


def _behind(places: Iterable[Place], limit: Callable[[Place], float]) -> list[Place]:
    places = list(places)
    least = min((place.order for place in places), default=None)
    hindmost = [place for place in places if place.order == least]
    return hindmost if all(place.still > limit(place) for place in hindmost) else []


@dataclass(frozen=True)
class Standstill:
    """A stall with its evidence: where all living ranks were, what was seen of their processes, and the hindmost."""

    stall: Stall
    places: Sequence[Place]
    looks: Mapping[int, Look]
    held_up: Sequence[Place] = ()

    def words(self) -> list[str]:
        """Who holds up the others, for how long, and in which call; for the terminal, before anything is done."""
        blamed = [failure.rank for failure in self.stall.culprits] or [place.rank for place in self.held_up]
        lines: list[str] = []
        for place in self.places:
            if place.rank not in blamed:
                continue
            why = "; it waits for others" if not self.stall.culprits else ""
            lines.append(
                f"rank {place.rank} (node {place.node}) has made no progress for {place.still:.1f} s, in {place}{why}"
            )
            look = self.looks.get(place.rank)
            frames = look.main.splitlines()[:_FRAMES] if look is not None and look.stacks else []
            lines += frames or ([f"  {look.why_silent()}"] if look is not None else [])
        return lines


def tell_stall(
    places: Sequence[Place], looks: Mapping[int, Look], now: float, *, hindmost: Sequence[Place] | None = None
) -> Standstill:
    """Who causes a stall, and who only waits.

    A stopped process does, for certain. Else it is those of the hindmost whose stack is in no collective. If all of
    them wait in one, they are to blame while others are ahead; ranks that all wait in one place wait for each other.

    Args:
        places: of all living ranks.
        looks: at as many of them as could be looked at.
        now: Unix time in seconds.
        hindmost: those furthest behind; by default, by the limits after which they are ended.
    """
    hindmost = stalled(places) if hindmost is None else list(hindmost)
    stopped = [place for place in places if place.rank in looks and looks[place.rank].stopped]
    awake = [place for place in hindmost if place.rank in looks and looks[place.rank].stacks]
    busy = [place for place in awake if not looks[place.rank].waits]
    culprits = stopped or busy or (hindmost if len(hindmost) < len(places) or len(places) == 1 else [])
    failures = tuple(_failure(place, looks.get(place.rank), now) for place in culprits)
    return Standstill(
        Stall(max(place.still for place in hindmost), str(hindmost[0]), failures), places, looks, hindmost
    )


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
