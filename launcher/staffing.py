"""Which nodes are lost, and who trains then: pure functions from what is known. Actions are elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

SILENCE = 3.0
"""Seconds of silence after which a node on another machine is lost, if its ranks have stopped too."""
LONG_SILENCE = 30.0
"""The same where there are signs of life: others get on, which they cannot without its ranks; or it is on this machine,
and is not stopped but slow."""
_MOVED = 1.0  # a rank that was somewhere else so many seconds ago gets on
LOSSES = 3
"""Failures after which a machine gets no node again."""


def silent_nodes(
    silence: Mapping[int, float], still: Mapping[int, float], *, here: Collection[int], stopped: Collection[int]
) -> dict[int, str]:
    """The nodes that are to be given up because they do not answer, and why in a few words.

    A node's death on this machine, or of its process alone, is seen otherwise, and at once. What only shows as silence
    is a machine without power, a cut cable, and a process that is stopped; or a machine so busy that the agent gets no
    core, which is no reason to give it up.

    Args:
        silence: seconds since the last answer, by node.
        still: seconds that the least still of a node's ranks has been in its place, by node, where it has any.
        here: nodes on the controller's machine.
        stopped: nodes whose agent is seen to be stopped.
    """
    getting_on = any(seconds < _MOVED and silence.get(node, 0.0) < SILENCE for node, seconds in still.items())
    lost: dict[int, str] = {}
    for node, seconds in silence.items():
        alive = getting_on or (node in here and node not in stopped)
        limit = LONG_SILENCE if alive else SILENCE
        if seconds > limit:
            why = "its agent is stopped, and" if node in stopped else "its agent"
            lost[node] = f"{why} has not answered for {limit:g} s"
    return lost


@dataclass(frozen=True)
class Crew:
    """What there is to go on with after nodes were lost.

    Attributes:
        wanted: nodes that the run had.
        there: nodes that are ready: those left, spares, and new ones.
        coming: whether another is on its way, or there is a machine that could take one.
        waited: seconds since the loss.
        patience: longest wait in seconds.
        sizes: the numbers of nodes that the run may have.
    """

    wanted: int
    there: int
    coming: bool
    waited: float
    patience: float
    sizes: Collection[int]


@dataclass(frozen=True)
class Staffing:
    """Go on with so many nodes, wait for more, or give up."""

    move: Literal["go", "wait", "give_up"]
    nodes: int = 0


def staff(crew: Crew) -> Staffing:
    """The next move after a loss: as many nodes as before if they are there or to be had in time, else fewer.

    A job that can be smaller waits only for a node that is on its way. One that cannot waits for whatever may come.
    """
    if crew.there >= crew.wanted:
        return Staffing("go", crew.wanted)
    smaller = max((size for size in crew.sizes if size <= crew.there), default=0)
    if crew.waited < crew.patience and (crew.coming or not smaller):
        return Staffing("wait")
    return Staffing("go", smaller) if smaller else Staffing("give_up")


def grown(now: int, there: int, sizes: Iterable[int]) -> int:
    """The number of nodes to go on with when ``there`` are ready and ``now`` train: the most that is allowed."""
    return max((size for size in sizes if now < size <= there), default=now)


def excluded(blamed: Sequence[str]) -> frozenset[str]:
    """The machines that get no node again: three failures are blamed on them. ``blamed`` names one a failure."""
    return frozenset(machine for machine, times in Counter(blamed).items() if times >= LOSSES)
