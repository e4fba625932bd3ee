"""Which snapshot in memory ranks go on from: a pure function of what the nodes hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .messages import HeldImage, Point


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


def in_place(point: Point, held: Mapping[int, Sequence[HeldImage]], ranks: Mapping[int, Collection[int]]) -> bool:
    """Whether every node has the images of the ranks that are to run there, so that nothing needs to be moved.

    Args:
        ranks: by node, the ranks of the generation that is to go on.
    """
    if sum(len(numbers) for numbers in ranks.values()) != point.world:
        return False
    here = {node: {image.rank for image in images if image.point == point} for node, images in held.items()}
    return all(set(numbers) <= here.get(node, set()) for node, numbers in ranks.items())


def newest_row(point: Point, held: Mapping[int, Sequence[HeldImage]]) -> int:
    """Step of the newest row of metrics that belongs before the snapshot; 0 where there is none."""
    return max(image.row for images in held.values() for image in images if image.point == point)
