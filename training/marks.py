"""Which of a rank's snapshots are to be copied to another node, and how long its own image of one is kept for that."""

from __future__ import annotations

from enum import IntEnum

from .staging import Stage


class Progress(IntEnum):
    """How far a rank is with the snapshot that was marked last, or, as the least of all of these, all ranks are."""

    MISSED = 0
    COPYING = 1
    COPIED = 2


class Marks:
    """Marks one snapshot after the other, the same ones on every rank: its node's agent copies it to another node then.

    A lost node takes with it its ranks' images, and the copies of others'. So of the snapshot that is gone on from, the
    other ranks' own images have to be there still, long after they have taken newer ones. A marked image is kept until
    every rank's image of a later one has been copied, which the ranks settle when they agree on other things. Until
    then no other is marked, so a slow copy makes marks rare and holds up nothing.

    Args:
        wanted: there is a node for copies.

    Attributes:
        due: the next snapshot is to be marked.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = self.due = wanted
        self._newest: Stage | None = None
        self._whole: Stage | None = None
        self._missed = False

    @property
    def stages(self) -> list[Stage]:
        """What is kept: the newest marked image, and that of which all copies are there."""
        return [stage for stage in (self._newest, self._whole) if stage is not None]

    def adopt(self, stage: Stage) -> None:
        """Keep what all ranks go on from."""
        self._whole = stage if self._wanted else None

    def taken(self, stage: Stage) -> None:
        """A snapshot was taken, which is marked if one was due."""
        if self.due:
            self._newest, self.due = stage, False

    def miss(self) -> None:
        """This rank could not take a snapshot that others have taken."""
        self._missed, self.due = self._missed or self.due, False

    @property
    def progress(self) -> Progress:
        """How far this rank is."""
        if self._missed:
            return Progress.MISSED
        return Progress.COPIED if self._newest is not None and self._newest.copied else Progress.COPYING

    def agree(self, progress: Progress) -> None:
        """Take in how far all ranks are: where all are done, or one has missed it, the next snapshot is marked."""
        if progress == Progress.COPYING:
            return
        over = self._whole if progress == Progress.COPIED else self._newest
        if over is not None:
            over.unmark()
        if progress == Progress.COPIED:
            self._whole = self._newest
        self._newest, self._missed, self.due = None, False, True
