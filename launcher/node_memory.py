"""The part of a node agent that controllers, and other agents, ask for snapshots in the node's memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

from .copies import Copier, NotTaken, send_image
from .held_images import HeldImages
from .held_rank import HeldRank
from .messages import HeldImage, Point, RankEvent
from .news import News


class NodeMemory:
    """Methods are called through Ray, several at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._news = News()
        self._ranks: dict[int, HeldRank] = {}
        self._images = HeldImages()
        self._generation = 0
        self._copier = Copier(self._images, self._lock, hear=self._hear_memory, say=self._say)

    def snapshots(self) -> list[HeldImage]:
        """The ranks' images that are complete in this node's memory now, copies from other nodes among them."""
        with self._lock:
            self._hear_memory()
            return self._images.all()

    def rows(self, point: Point) -> dict[int, list[dict[str, Any]]]:
        """By rank, the newest rows of metrics before a snapshot, which may not have reached the controller."""
        with self._lock:
            return self._images.rows(point)

    def pass_on(self, point: Point, targets: Sequence[tuple[int, Any]]) -> str:
        """Copy images of a snapshot to other nodes; why not all are there, or nothing.

        Args:
            targets: pairs of a rank and the agent that is to have its image.
        """
        for rank, target in targets:
            with self._lock:
                fd = self._images.descriptor(point, rank)
            if fd is None:
                return f"that of rank {rank} is gone"
            try:
                if not send_image(fd, target, generation=self._generation, kept=(point,)):
                    return f"that of rank {rank} was written over"
            except NotTaken as error:
                return str(error)
            finally:
                os.close(fd)
        return ""

    def receive(self, generation: int, image: HeldImage, kept: Sequence[Point], begin: int, data: bytes) -> str:
        """Take in a part of an image from another node; why it is not taken, or nothing.

        Args:
            generation: of the sender's ranks: an older one than this node's has no say any more.
            kept: see :meth:`~.held_images.HeldImages.receive`.
            begin: where in the image the part lies.
        """
        with self._lock:
            if generation < self._generation:
                return f"ranks have been started again since (generation {self._generation}, not {generation})"
            if not self._images.receive(image, kept, begin, data):
                return "there is too little free memory there"
        return ""

    def _say(self, text: str) -> None:
        with self._lock:
            rank = min((rank.plan.rank for rank in self._ranks.values()), default=0)
            note = RankEvent("message", self._generation, rank, data={"t": "note", "text": text})
        self._news.tell([note])

    def _hear_memory(self) -> None:
        for rank in self._ranks.values():
            if rank.memory is not None:
                self._images.hear(rank.plan.rank, rank.memory)

    def _let_go(self) -> None:
        """Let go of what the ranks went on from, once they have something newer."""
        if self._images.foreign:
            self._hear_memory()
            self._images.settle(self._generation, copies=self._copier.active)
