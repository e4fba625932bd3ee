"""Which snapshot in memory ranks go on from, and who copies to whom: pure functions of what the nodes are and hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from .messages import HeldImage, Point


class Move(NamedTuple):
    """A rank's image that has to be copied from one node to another."""

    rank: int
    source: int
    target: int


def complete_points(held: Mapping[int, Sequence[HeldImage]]) -> list[Point]:
    """The snapshots of which every rank's image is on some node, newest first.

    Of two of the same step the later generation's comes first.

    Args:
        held: by node, the images in its memory.
    """
    ranks: dict[Point, set[int]] = {}
    for images in held.values():
        for image in images:
            ranks.setdefault(image.point, set()).add(image.rank)
    whole = [point for point, found in ranks.items() if len(found) == point.world]
    return sorted(whole, key=lambda point: (point.step, point.generation), reverse=True)


def moves(point: Point, held: Mapping[int, Sequence[HeldImage]], ranks: Mapping[int, Collection[int]]) -> list[Move]:
    """What is to be moved so that every node has the images of the ranks that are to run there.

    Args:
        point: a complete snapshot.
        ranks: by node, the ranks of the generation that is to go on.
    """
    where: dict[int, list[int]] = {}
    for node, images in sorted(held.items()):
        for image in images:
            if image.point == point:
                where.setdefault(image.rank, []).append(node)
    wanted = [(rank, node) for node, numbers in sorted(ranks.items()) for rank in numbers]
    return [Move(rank, where[rank][0], node) for rank, node in wanted if node not in where[rank]]


def newest_row(point: Point, held: Mapping[int, Sequence[HeldImage]]) -> int:
    """Step of the newest row of metrics that belongs before the snapshot; 0 where there is none."""
    return max(image.row for images in held.values() for image in images if image.point == point)


def gone_ranks(held: Mapping[int, Sequence[HeldImage]], world: int) -> list[int]:
    """The ranks of which no node has any image of a snapshot of ``world`` ranks."""
    left = {image.rank for images in held.values() for image in images if image.world == world}
    return sorted(set(range(world)) - left)


def buddies(machines: Sequence[str]) -> list[int]:
    """For each node, the one that holds the copies of its snapshots: each holds those of one other.

    It is on another machine wherever the nodes lie so that all can have one there by counting on equally far; else for
    as many as can be.

    Args:
        machines: of at least two nodes, by their number.
    """
    count = len(machines)

    def elsewhere(distance: int) -> int:
        return sum(machine != machines[(node + distance) % count] for node, machine in enumerate(machines))

    distance = max(range(1, count), key=lambda distance: (elsewhere(distance), -distance))
    return [(node + distance) % count for node in range(count)]
