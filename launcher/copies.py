"""Copies of snapshots in memory on another node: how one is sent, and the thread that has each node's ready."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..checkpoint.image import DATA, note_copied, read_head
from . import untyped
from .held_images import HeldImages, ToCopy, image_of
from .messages import Point

_SLICE = 2 << 20  # bytes in one call: they pass through Ray's object store, which holds few on an embedded cluster
_ANSWER = 30.0
_LOOK = 0.1
_AGAIN = 5.0  # seconds until a copy that was refused, or failed, is tried again
_PER_CORE, _MOST = 0.01, 0.25  # of the time that a copy may be on its way: it keeps about two cores busy


class NotTaken(Exception):  # no error of ours: the other node says why
    """Another node did not take an image."""


def send_image(fd: int, target: Any, *, generation: int, kept: tuple[Point, ...], share: float = 1.0) -> bool:
    """Copy the image behind a descriptor to another node; False where it does not count, or not any more.

    Args:
        target: that node's agent.
        generation: of the sender's ranks, or of those that were the last.
        kept: see :meth:`~.held_images.HeldImages.receive`.
        share: of the time that calls may take.

    Raises:
        NotTaken: the other node did not take it.
        RayError: its agent is gone, or did not answer.
    """
    found = read_head(fd)
    if found is None or not found[1]:
        return False
    image, size = image_of(found[0]), found[0].size
    for begin in [*range(DATA, size, _SLICE), 0]:
        began = time.monotonic()
        data = os.pread(fd, min(_SLICE, size - begin) if begin else DATA, begin)
        if read_head(fd) != found:
            return False
        why: str = untyped.ray().get(target.receive.remote(generation, image, kept, begin, data), timeout=_ANSWER)
        if why:
            raise NotTaken(why)
        time.sleep((time.monotonic() - began) * (1 / share - 1))
    return True


@dataclass(frozen=True)
class _Task:
    """Whose images are to be copied, and where to."""

    generation: int
    target: Any


class Copier:
    """Has another node hold copies of what the ranks here have marked, one at a time, in the background.

    Args:
        lock: guards ``images``.
        hear: takes in which memory the ranks want to be kept; called under the lock.
        say: tells the user.
    """

    def __init__(
        self, images: HeldImages, lock: threading.Lock, *, hear: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        self._images, self._lock, self._hear, self._say = images, lock, hear, say
        self._share = min(_MOST, _PER_CORE * len(os.sched_getaffinity(0)))
        self._task: _Task | None = None
        self._told = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def active(self) -> bool:
        """Whether there is a node for copies."""
        return self._task is not None

    def begin(self, generation: int, target: Any) -> None:
        """Copy what ranks of ``generation`` mark to the agent ``target``; None: to nobody."""
        self._task = _Task(generation, target) if target is not None else None
        if self._task is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dltrain-copies", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Copy no more."""
        self._task = None
        self._over.set()

    def _run(self) -> None:
        pause = _LOOK
        while not self._over.wait(pause):
            task = self._task
            pause = _LOOK if task is None or self._round(task) else _AGAIN

    def _round(self, task: _Task) -> bool:
        """Copy what there is; whether all went well."""
        with self._lock:
            self._hear()
            images = self._images.to_copy(task.generation)
        try:
            for image in images:
                if self._task is task:
                    self._copy(image, task)
        except NotTaken as error:
            if self._task is task and not self._told:
                self._told = True
                ranks = " and ".join(sorted({str(image.head.rank) for image in images}))
                self._say(f"no new copies of the snapshots of rank {ranks} on another node: {error}")
            return False
        except untyped.ray().exceptions.RayError:  # the controller hears of that itself
            return False
        finally:
            for image in images:
                os.close(image.fd)
        return True

    def _copy(self, image: ToCopy, task: _Task) -> None:
        generation, kept, fd = task.generation, image.kept, image.fd
        if read_head(fd) == (image.head, True) and send_image(
            fd, task.target, generation=generation, kept=kept, share=self._share
        ):
            note_copied(fd, image.head.number)
            self._told = False
