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

from ..checkpoint.image import Head, Image, number_copied, read_head
from ..core.memory import Room
from .messages import HeldImage, Point

_MAX_MESSAGE, _MAX_FDS = 1 << 16, 4
_RESERVE = 0.1  # of a machine's memory, which copies of other nodes' images leave free
_AT_ONCE = 200  # descriptors in one message; the kernel takes 253


@dataclass
class _Memory:
    """Memory that may hold an image.

    Attributes:
        owner: the rank that writes to it; None when its ranks are gone, and for what came from another node.
        copy_of: the other node's image that it is a copy of, complete or not; None when it is let go of as what ranks
            went on from is.
    """

    fd: int
    owner: int | None
    copy_of: HeldImage | None = None

    def head(self) -> Head | None:
        """What it says of itself, if it counts."""
        found = read_head(self.fd)
        return found[0] if found is not None and found[1] else None

    def image(self) -> HeldImage | None:
        """What it holds now, if that counts."""
        head = self.head()
        return None if head is None else image_of(head)


def image_of(head: Head) -> HeldImage:
    """What is told of an image."""
    return HeldImage(head.generation, head.step, head.rank, head.world, head.row, head.size)


@dataclass(frozen=True)
class ToCopy:
    """An image that a rank here keeps until another node has a copy.

    Attributes:
        fd: a descriptor of it, to be closed.
        kept: the snapshots of which the rank keeps its images: copies of others are of no use.
    """

    fd: int
    head: Head
    kept: tuple[Point, ...]


class HeldImages:
    """The memory of all ranks of a node. Not thread-safe."""

    def __init__(self) -> None:
        self._memories: list[_Memory] = []
        self._here: frozenset[int] = frozenset()

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
        """Whether there is memory of earlier ranks, which none here writes to."""
        return any(memory.owner is None and memory.copy_of is None for memory in self._memories)

    def all(self) -> list[HeldImage]:
        """The images that are complete now."""
        return [image for memory in self._memories if (image := memory.image()) is not None]

    def rows(self, point: Point) -> dict[int, list[dict[str, Any]]]:
        """The newest rows of metrics of each rank whose image of ``point`` is here."""
        return {image.rank: Image(memory.fd).rows for memory, image in self._of(point)}

    def descriptor(self, point: Point, rank: int) -> int | None:
        """A descriptor, to be closed, of a rank's image; None where it is not here."""
        return next((os.dup(memory.fd) for memory, image in self._of(point) if image.rank == rank), None)

    def to_copy(self, generation: int) -> list[ToCopy]:
        """The images of ``generation`` that are marked for a copy and have none yet."""
        marked: dict[int, list[tuple[_Memory, Head]]] = {}
        for memory in self._memories:
            head = memory.head()
            if memory.owner is not None and head is not None and head.marked and head.generation == generation:
                marked.setdefault(memory.owner, []).append((memory, head))
        return [
            ToCopy(os.dup(memory.fd), head, tuple(image_of(each).point for _, each in pairs))
            for pairs in marked.values()
            for memory, head in pairs
            if number_copied(memory.fd) != head.number
        ]

    def receive(self, image: HeldImage, kept: Collection[Point], begin: int, data: bytes) -> bool:
        """Take in a part of another node's image, which counts once its head is here; whether there is room for it.

        Args:
            kept: the snapshots that the image's rank still needs; copies of its images of others are let go.
            begin: where in the image the part lies.
        """
        memory = next((memory for memory in self._memories if memory.copy_of == image), None)
        if memory is None:
            copies = [m for m in self._memories if m.copy_of is not None and m.copy_of.rank == image.rank]
            self._drop([m for m in copies if m.image() is None or not self._is_of(m, kept)])
            room = Room.now()
            if room is not None and room.free - image.size < _RESERVE * room.total:
                return False
            memory = _Memory(os.memfd_create("dltrain-copy"), None, image)
            self._memories.append(memory)
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(memory.fd, view[done:], begin + done)
        return True

    def begin(self, point: Point | None, ranks: Collection[int]) -> None:
        """Keep what ``ranks``, which are to run here, go on from or write to; let go of the rest."""
        self._here = frozenset(ranks)
        for memory in self._memories:
            memory.copy_of = None
            if memory.owner not in ranks:
                memory.owner = None
        if point is None:
            self._drop(self._memories)
        else:
            self._drop([m for m in self._memories if m.owner is None and not self._is_of(m, [point])])

    def settle(self, generation: int, *, copies: bool) -> None:
        """Let go of what the ranks here went on from and do not write to, once each has two newer snapshots of its own.

        Then all ranks of the generation, on other nodes too, have taken one.

        Args:
            copies: only marked ones are newer, since other nodes have copies of the first one then.
        """
        old = [m for m in self._memories if m.owner is None and (head := m.head()) and head.generation < generation]
        if old:
            heads = [(m.owner, head) for m in self._memories if (head := m.head()) and head.generation == generation]
            own = Counter(owner for owner, head in heads if head.marked or not copies)
            if all(own[rank] > 1 for rank in self._here):
                self._drop(old)

    def hand_over(self, point: Point, rank: int, sock: socket.socket, *, reading: bool) -> None:
        """Give a new rank what it goes on from, and the memory that is its own from now on.

        Args:
            reading: a process of the rank before may still read its memory: it must not be written to.
        """
        restoring = {id(memory) for memory, image in self._of(point) if image.rank in self._here}
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
