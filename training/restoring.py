"""Going on from what was saved: from images in memory, or from the newest checkpoint that is whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ..checkpoint.image import Images
from ..checkpoint.manifest import CorruptCheckpoint, Manifest
from ..checkpoint.reader import catalogue, open_manifest
from ..checkpoint.retention import set_aside
from ..core.contracts import Engine
from ..core.errors import JobError, Problem
from ..core.formats import is_url
from ..core.job import Job
from ..core.storage import Storage
from .context import Context
from .filling import AFRESH, Filler, fill_all, fill_from_memory, fill_weights
from .reporter import Reporter
from .together import gathered

T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """What an engine was filled from.

    Attributes:
        durable: it is a checkpoint in the folder that this run writes to.
    """

    manifest: Manifest
    durable: bool


class Restorer:
    """Fills an engine, together with the other ranks.

    Args:
        storage: the folder that this run's checkpoints go to.
    """

    def __init__(self, engine: Engine, job: Job, ctx: Context, storage: Storage, reporter: Reporter) -> None:
        self._engine, self._job, self._storage, self._reporter = engine, job, storage, reporter
        self._rank, self._world = ctx.rank, ctx.world_size

    def from_memory(self, images: Images, *, saved: int) -> Restored:
        """Load the snapshot that lies in this node's memory. ``saved`` is the step of this run's newest checkpoint.

        Raises:
            CorruptCheckpoint: a rank's node does not have all that the rank needs. The engine's state is undefined.
        """
        _, failure = self._together(partial(self._engine.load, partial(fill_from_memory, images)))
        if failure:
            raise CorruptCheckpoint(images.step, "images in memory", "", failure)
        return Restored(images.manifest, durable=images.step == saved)

    def from_storage(self, urls: Sequence[str]) -> Restored | None:
        """Load the newest checkpoint that is whole, from the first of ``urls`` that has one; None where there is none.

        A newer one that is not whole is told of. In the folder that this run writes to, what is newer than the restored
        step is set aside: the run goes on from there.

        Raises:
            JobError: a whole checkpoint does not fit the job, or none of a folder's is whole: whether to start over is
                the user's decision.
        """
        for url in urls:
            storage = Storage(url, self._job.checkpoint.options if is_url(url) else None)
            manifest = self._load_newest(storage, fill_all, where="checkpoint.to")
            if manifest is not None:
                durable = str(storage) == str(self._storage)
                if durable and self._rank == 0:
                    set_aside(storage, after=manifest.step)
                return Restored(manifest, durable)
        return None

    def weights_from(self, url: str) -> None:
        """Take only the weights from the newest whole checkpoint in the folder ``url``.

        Raises:
            JobError: they do not fit the model, or no checkpoint there is whole.
        """
        storage = Storage(url, self._job.checkpoint.options if is_url(url) else None)
        everyones = gathered([*self._engine.state()], self._world)
        names = {name for names in everyones for name in names if name.startswith("model.")}
        self._load_newest(storage, partial(fill_weights, names=names), where="--init-from")

    def _load_newest(self, storage: Storage, fill: Filler, *, where: str) -> Manifest | None:
        """Load the newest checkpoint that is whole with ``fill``; None where there is none at all."""
        newest = ""
        for step in gathered([entry.step for entry in catalogue(storage)] if self._rank == 0 else [], self._world)[0]:
            manifest, failure = self._together(partial(open_manifest, storage, step))
            if manifest is not None:  # on every rank: loading is collective
                _, failure = self._together(partial(self._engine.load, partial(fill, storage, manifest)))
            if not failure:
                return manifest
            if self._rank == 0:
                self._reporter.send("note", text=f"checkpoint of step {step} is not usable: {failure}")
            newest = newest or failure
        if newest:
            raise JobError(Problem(f"no checkpoint in {storage} is usable: {newest}", where, AFRESH))
        return None

    def _together(self, call: Callable[[], T]) -> tuple[T | None, str]:
        """What ``call`` returns where it succeeds on every rank; else nothing, and the first rank's reason.

        Raises:
            JobError: a rank refuses the job: every rank does then, with its words.
        """
        found, failure, refusal = None, "", tuple[Problem, ...]()
        try:
            found = call()
        except JobError as error:
            refusal = error.problems
        except (CorruptCheckpoint, OSError) as error:
            failure = f"rank {self._rank}: {error}"
        everyones = gathered((failure, refusal), self._world)
        for _, problems in everyones:
            if problems:
                raise JobError(*problems)
        first = next((why for why, _ in everyones if why), "")
        return (None, first) if first else (found, "")
