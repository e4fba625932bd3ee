"""Snapshots in a node's memory, as its agent holds them: they are there when the ranks that copied them are gone."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..checkpoint.image import Image, copy_image, read_head
from .messages import HeldImage, Point

_MAX_MESSAGE, _MAX_FDS = 1 << 16, 4
_AT_ONCE = 200  # descriptors in one message; the kernel takes 253


@dataclass
class _Memory:
    """Memory that may hold an image.

    Attributes:
        owner: the rank that writes to it; None when its ranks are gone, and for what came from another node.
    """

    fd: int
    owner: int | None

    def image(self) -> HeldImage | None:
        """What it holds now, if that counts."""
        found = read_head(self.fd)
        if found is None or not found[1]:
            return None
        head = found[0]
        return HeldImage(head.generation, head.step, head.rank, head.world, head.row, head.size)


class HeldImages:
    """The memory of all ranks of a node. Not thread-safe."""

    def __init__(self) -> None:
        self._memories: list[_Memory] = []

    def hear(self, rank: int, sock: socket.socket) -> None:
        """Take in which memory a rank wants to be kept, and which no more."""
        with contextlib.suppress(OSError):  # nothing more
            while True:
                data, fds, _, _ = socket.recv_fds(sock, _MAX_MESSAGE, _MAX_FDS)
                if not data:
                    return
                message = json.loads(data)
                match message["t"]:
                    case "keep":
                        self._memories += [_Memory(fd, rank) for fd in fds]
                    case "drop":
                        self._drop([m for m in self._memories if os.fstat(m.fd).st_ino == message["inode"]])
                    case other:
                        raise ValueError(f"rank {rank} sent a message of kind {other!r}")

    @property
    def foreign(self) -> bool:
        """Whether there is memory that no rank here writes to."""
        return any(memory.owner is None for memory in self._memories)

    def all(self) -> list[HeldImage]:
        """The images that are complete now."""
        return [image for memory in self._memories if (image := memory.image()) is not None]

    def rows(self, point: Point) -> dict[int, list[dict[str, Any]]]:
        """The newest rows of metrics of each rank whose image of ``point`` is here."""
        return {image.rank: Image(memory.fd).rows for memory, image in self._of(point)}

    def copy(self, point: Point, rank: int) -> bytes | None:
        """A rank's image, to be put on another node; None where it is not here, or was written over meanwhile."""
        for memory, image in self._of(point):
            if image.rank == rank:
                raw = copy_image(memory.fd)
                if raw is not None:
                    return raw
        return None

    def put(self, raw: bytes) -> None:
        """Hold a copy of another node's image."""
        fd = os.memfd_create("dltrain-copy")
        view, done = memoryview(raw), 0
        while done < len(view):
            done += os.write(fd, view[done:])
        self._memories.append(_Memory(fd, None))

    def drop_copies(self, kept: Collection[Point]) -> None:
        """Let go of the copies from other nodes that are of none of these snapshots."""
        self._drop([m for m in self._memories if m.owner is None and not self._is_of(m, kept)])

    def begin(self, point: Point | None, ranks: Collection[int]) -> None:
        """Keep what ``ranks``, which are to run here, go on from or write to; let go of the rest."""
        for memory in self._memories:
            if memory.owner not in ranks:
                memory.owner = None
        if point is None:
            self._drop(self._memories)
        else:
            self._drop([m for m in self._memories if m.owner is None and not self._is_of(m, [point])])

    def settle(self, generation: int, ranks: Collection[int]) -> None:
        """Let go of what ``ranks`` went on from and do not write to, once each has taken two snapshots of its own.

        Then all ranks of the generation, on other nodes too, have taken one.
        """
        old = [m for m in self._memories if m.owner is None and (image := m.image()) and image.generation < generation]
        if old:
            own = Counter(m.owner for m in self._memories if (image := m.image()) and image.generation == generation)
            if all(own[rank] > 1 for rank in ranks):
                self._drop(old)

    def hand_over(self, point: Point, rank: int, sock: socket.socket, *, reading: bool) -> None:
        """Give a new rank what it goes on from, and the memory that is its own from now on.

        Args:
            reading: a process of the rank before may still read its memory: it must not be written to.
        """
        restoring = {id(memory) for memory, _ in self._of(point)}
        chosen = [m for m in self._memories if id(m) in restoring or (m.owner == rank and not reading)]
        labels = [{"restores": id(m) in restoring, "mine": m.owner == rank and not reading} for m in chosen]
        for first in range(0, len(chosen), _AT_ONCE):
            message = json.dumps({"t": "given", "images": labels[first : first + _AT_ONCE]}).encode()
            fds = array.array("i", [memory.fd for memory in chosen[first : first + _AT_ONCE]])
            sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)], socket.MSG_NOSIGNAL)
        if reading:
            for memory in self._memories:
                if memory.owner == rank:
                    memory.owner = None

    def close(self) -> None:
        self._drop(self._memories)

    def _of(self, point: Point) -> list[tuple[_Memory, HeldImage]]:
        pairs = [(memory, memory.image()) for memory in self._memories]
        return [(m, image) for m, image in pairs if image is not None and image.point == point]

    def _is_of(self, memory: _Memory, points: Collection[Point]) -> bool:
        image = memory.image()
        return image is not None and image.point in points

    def _drop(self, memories: list[_Memory]) -> None:
        for memory in list(memories):
            self._memories.remove(memory)
            os.close(memory.fd)
