"""What a new generation of ranks goes on from: found among the snapshots in the nodes' memory, if it is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .generation import Generation
from .intake import Intake
from .messages import HeldImage, Point
from .metrics import Metrics
from .points import Move, complete_points, gone_ranks, moves, newest_row

#: Calls a method of every agent that is there, with arguments; the answers by node.
Ask = Callable[..., dict[int, Any]]
#: Waits for answers of a generation's agents, by node, for so many seconds; notes as lost who gives none.
Gather = Callable[[Generation, dict[int, Any], str, float], dict[int, Any]]

_PER_BYTE = 1 / 50e6  # seconds that a copy may take
_AT_LEAST = 30.0


@dataclass(frozen=True)
class Origin:
    """What a generation goes on from.

    Attributes:
        point: a snapshot in memory; None for the newest checkpoint, or the beginning.
        interrupted: a checkpoint was given up that was being written.
        copies: how many ranks' images of it are taken from copies on other nodes, by node.
        why: there is no point though nodes have snapshots in memory.
    """

    point: Point | None = None
    interrupted: bool = False
    copies: Mapping[int, int] | None = None
    why: str = ""

    @property
    def memory(self) -> str:
        """Where the point lies, in words; empty where there is none."""
        return f"in memory of {self._ranks}" if self.point else ""

    def __str__(self) -> str:
        if self.point:
            return f" from step {self.point.step}, in the memory of {self._ranks}"
        return f", but not from memory: {self.why}" if self.why else ""

    @property
    def _ranks(self) -> str:
        assert self.point is not None
        world = self.point.world
        text = f"{world} rank{'s' if world > 1 else ''}"
        for node, count in sorted((self.copies or {}).items()):
            text += f", {count} of them from node {node}'s copy"
        return text


class Recall:
    """Asks the agents what they hold.

    Args:
        nproc: ranks per node.
    """

    def __init__(self, intake: Intake, metrics: Metrics, *, nproc: int) -> None:
        self._intake, self._metrics, self._nproc = intake, metrics, nproc

    def find(self, generation: Generation, ask: Ask) -> Origin:
        """The newest snapshot in memory that ranks can go on from, after ``generation`` has ended; none where the
        newest checkpoint is newer, or there is none.

        It counts only with all rows of metrics before it: those that its ranks had not sent yet lie beside it. Where
        nodes were lost it may be that only copies on other nodes are left of what was there.
        """
        if generation.point is not None and not generation.begun and not _killed(generation):
            return Origin()  # what it was to go on from is of no use
        held = self._held(ask)
        for point in complete_points(held):
            if point.step < self._intake.saved:
                return Origin()
            in_place = not moves(point, held, self._places(point))
            if (in_place or generation.lost) and self._take_rows(generation, point, held, ask):
                return Origin(point)
        return Origin(why=_gone(held, generation.world) if generation.lost else "")

    def assemble(
        self, generation: Generation, origin: Origin, agents: Sequence[Any], ask_of: Ask, gather: Gather
    ) -> Origin:
        """The same on the nodes that train next, which are others: what they need of a snapshot is moved there.

        Args:
            generation: the one that has ended.
            origin: what was found before.
            agents: of the nodes that train next.
            ask_of: takes a generation first, to note in it who is lost.
        """
        if origin.point is None:
            return origin
        if origin.point.world != len(agents) * self._nproc:
            return Origin()
        coming = Generation(generation.number, origin.point.world, self._nproc)  # its start finds who is lost now
        ask = partial(ask_of, coming)
        held = self._held(ask)
        for point in complete_points(held):
            if point.step < self._intake.saved:
                break
            if point.world == origin.point.world and self._take_rows(generation, point, held, ask):
                needed = moves(point, held, self._places(point))
                if why := self._move(point, needed, held, agents, partial(gather, coming)):
                    return Origin(why=f"a snapshot could not be copied to where it is needed: {why}")
                return replace(origin, point=point, copies=Counter(move.source for move in needed))
        return Origin(why=_gone(held, generation.world))

    def _held(self, ask: Ask) -> dict[int, list[HeldImage]]:
        return ask("snapshots", waiting_for="asking for snapshots in memory")

    def _places(self, point: Point) -> dict[int, range]:
        """By node, the ranks that are to run there."""
        return {rank // self._nproc: range(rank, rank + self._nproc) for rank in range(0, point.world, self._nproc)}

    def _take_rows(
        self, generation: Generation, point: Point, held: Mapping[int, Sequence[HeldImage]], ask: Ask
    ) -> bool:
        """Take in the rows of metrics that lie beside a snapshot; whether all before it are there then."""
        answers: dict[int, Mapping[int, Any]] = ask("rows", point, waiting_for="asking for rows of metrics")
        ranks = {rank: rows for found in answers.values() for rank, rows in found.items()}
        self._intake.recover(generation, point, ranks)
        return self._metrics.last_step >= newest_row(point, held)

    def _move(
        self,
        point: Point,
        needed: Sequence[Move],
        held: Mapping[int, Sequence[HeldImage]],
        agents: Sequence[Any],
        gather: Callable[[dict[int, Any], str, float], dict[int, Any]],
    ) -> str:
        """Copy images to the nodes that need them; why not all are there, or nothing."""
        sizes = {image.rank: image.size for images in held.values() for image in images if image.point == point}
        timeout = _AT_LEAST + sum(sizes[move.rank] for move in needed) * _PER_BYTE
        targets: dict[int, list[tuple[int, Any]]] = {}
        for rank, source, target in needed:
            targets.setdefault(source, []).append((rank, agents[target]))
        refs = {source: agents[source].pass_on.remote(point, pairs) for source, pairs in targets.items()}
        answers: dict[int, str] = gather(refs, "copying snapshots to another node", timeout)
        return next(filter(None, (answers.get(source, f"node {source} gave no answer") for source in targets)), "")


def _gone(held: Mapping[int, Sequence[HeldImage]], world: int) -> str:
    """Of which ranks no node has anything, in words; empty where none has anything of any, or one has of all."""
    gone = gone_ranks(held, world)
    if not gone or len(gone) == world:
        return ""
    return f"no node that is left has a snapshot of rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))}"


def _killed(generation: Generation) -> bool:
    """Whether its ranks were taken from outside before they could begin, or cut off from each other."""
    stopped = generation.standstill.stall.culprits if generation.standstill else ()
    failures = (*stopped, *(casualty.failure for casualty in generation.casualties.values()))
    first = min(failures, key=lambda failure: failure.order, default=None)
    return bool(generation.lost) or (first is not None and (first.abrupt or first.witness))
