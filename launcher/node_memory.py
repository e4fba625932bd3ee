"""The part of a node agent that controllers ask for snapshots in the node's memory."""

from __future__ import annotations

import threading
from typing import Any

from .held_images import HeldImages
from .held_rank import HeldRank
from .messages import HeldImage, Point


class NodeMemory:
    """Methods are called through Ray, several at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranks: dict[int, HeldRank] = {}
        self._images = HeldImages()
        self._generation = 0

    def snapshots(self) -> list[HeldImage]:
        """The ranks' images that are complete in this node's memory now, copies from other nodes among them."""
        with self._lock:
            self._hear_memory()
            return self._images.all()

    def rows(self, point: Point) -> dict[int, list[dict[str, Any]]]:
        """By rank, the newest rows of metrics before a snapshot, which may not have reached the controller."""
        with self._lock:
            return self._images.rows(point)

    def fetch(self, point: Point, rank: int) -> bytes | None:
        """A rank's image, for :meth:`put` on another node; None where it is not here, or was written over meanwhile."""
        with self._lock:
            self._hear_memory()
            return self._images.copy(point, rank)

    def put(self, image: bytes | None) -> bool:
        """Hold a copy of another node's image (None: there is none); whether there is one."""
        if image is not None:
            with self._lock:
                self._images.put(image)
        return image is not None

    def drop_copies(self, kept: list[Point]) -> None:
        """Let go of copies from other nodes, except of these snapshots."""
        with self._lock:
            self._images.drop_copies(kept)

    def _hear_memory(self) -> None:
        for rank in self._ranks.values():
            if rank.memory is not None:
                self._images.hear(rank.plan.rank, rank.memory)

    def _let_go(self) -> None:
        """Let go of what the ranks went on from, once they have something newer."""
        if self._images.foreign:
            self._hear_memory()
            ranks = [rank.plan.rank for rank in self._ranks.values() if rank.generation == self._generation]
            self._images.settle(self._generation, ranks)
