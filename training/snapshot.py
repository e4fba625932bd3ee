"""Checkpoints from the rank's side: save together, restore together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..checkpoint.manifest import CorruptCheckpoint, Manifest
from ..checkpoint.reader import catalogue, open_manifest, read
from ..checkpoint.retention import prune, set_aside
from ..checkpoint.writer import PieceRecord, assign, commit, held, make_manifest, write_shard
from ..core.contracts import Engine, ShardedState
from ..core.errors import DltrainError, JobError, Problem
from ..core.formats import is_url
from ..core.job import Job
from ..core.storage import Storage
from .reporter import Reporter

T = TypeVar("T")

_SETTLE = 10.0
_AFRESH = "'--resume never' starts afresh"


class SaveFailed(DltrainError):
    """A checkpoint could not be written; the older ones are untouched."""


@dataclass(frozen=True)
class Position:
    """Where in the job a checkpoint was taken: completed steps, samples consumed, and small facts to carry over."""

    step: int
    samples: int
    total_steps: int
    extra: dict[str, Any]


class Snapshots:
    """Saves and restores an engine's state on one storage folder. Every method is collective over ``world`` ranks.

    Attributes:
        newest: step of the checkpoint in this folder that was saved or restored last; -1 before.
    """

    def __init__(self, storage: Storage, job: Job, *, rank: int, world: int, reporter: Reporter) -> None:
        self._storage = storage
        self._job = job
        self._rank, self._world = rank, world
        self._reporter = reporter
        self.newest = -1

    def save(self, engine: Engine, position: Position, tracking: dict[str, Any]) -> None:
        """Write a complete checkpoint, the manifest last.

        Raises:
            SaveFailed: any rank could not write its part (on every rank alike).
        """
        self._reporter.sync()
        state = engine.state()
        mine = assign(self._all(held(state)))[self._rank]
        outcome: list[PieceRecord] | str
        try:
            outcome = write_shard(self._storage, position.step, self._rank, self._world, state, mine)
        except OSError as error:
            outcome = f"rank {self._rank}: {type(error).__name__}: {error}"
        outcomes = self._all(outcome)
        failures = [item for item in outcomes if isinstance(item, str)]
        if not failures:
            records = [record for item in outcomes if not isinstance(item, str) for record in item]
            failures = self._commit(records, position, tracking)
        if failures:
            raise SaveFailed(f"checkpoint of step {position.step} not written: " + "; ".join(failures))
        self.newest = position.step

    def _commit(self, records: list[PieceRecord], position: Position, tracking: dict[str, Any]) -> list[str]:
        failure: str | None = None
        if self._rank == 0:
            manifest = make_manifest(
                records,
                step=position.step,
                total_steps=position.total_steps,
                samples=position.samples,
                world=self._world,
                job=self._job.model_dump(mode="json"),
                rng={"seed": self._job.seed},
                tracking=tracking,
                extra=position.extra,
            )
            if not self._reporter.settle(_SETTLE):
                self._reporter.send(
                    "note", text=f"the metrics were not on the disk within {_SETTLE:g} s; saving all the same"
                )
            try:
                commit(self._storage, manifest)
                prune(self._storage, self._job.checkpoint.keep)
            except OSError as error:
                failure = f"{type(error).__name__}: {error}"
            else:
                self._reporter.send("saved", step=position.step)
        return [item for item in self._all(failure) if item is not None]

    def restore(self, engine: Engine, urls: Sequence[str]) -> Manifest | None:
        """Load the newest checkpoint that is whole, from the first of ``urls`` that has one; None where there is none.

        A newer one that is not whole is told of. In the folder that this run writes to, what is newer than the restored
        step is set aside: the run goes on from there.

        Raises:
            JobError: a whole checkpoint does not fit the job, or none of a folder's is whole: whether to start over is
                the user's decision.
        """
        for url in urls:
            storage = Storage(url, self._job.checkpoint.options if is_url(url) else None)
            manifest = self._restore_from(storage, engine)
            if manifest is not None:
                if str(storage) == str(self._storage):
                    self.newest = manifest.step
                    if self._rank == 0:
                        set_aside(storage, after=manifest.step)
                return manifest
        return None

    def _restore_from(self, storage: Storage, engine: Engine) -> Manifest | None:
        newest: str | None = None
        for step in self._all([entry.step for entry in catalogue(storage)] if self._rank == 0 else [])[0]:
            failure: str | None = None
            manifest: Manifest | None = None
            try:
                manifest = open_manifest(storage, step)
                engine.load(partial(_fill, storage, manifest))
            except (CorruptCheckpoint, OSError) as error:
                failure = f"rank {self._rank}: {error}"
            failures = [item for item in self._all(failure) if item is not None]
            if not failures:
                return manifest
            if self._rank == 0:
                self._reporter.send("note", text=f"checkpoint of step {step} is not usable: {failures[0]}")
            newest = newest or failures[0]
        if newest is not None:
            raise JobError(Problem(f"no checkpoint in {storage} is usable: {newest}", "checkpoint.to", _AFRESH))
        return None

    def _all(self, value: T) -> list[T]:
        """Every rank's ``value``, in rank order."""
        if self._world == 1:
            return [value]
        gathered: list[T | None] = [None] * self._world
        dist.all_gather_object(gathered, value)
        return gathered  # pyright: ignore[reportReturnType]  # each place is filled


def _fill(storage: Storage, manifest: Manifest, shards: ShardedState) -> None:
    """Copy the checkpoint's slices into ``shards``; only these are read.

    Raises:
        JobError: the checkpoint has no tensor of a shard's name and whole shape.
        CorruptCheckpoint: a piece of it is damaged.
    """
    for name, shard in shards.items():
        entry = manifest.tensors.get(name)
        if entry is None and name.startswith("optimizer."):
            what = f"the checkpoint of step {manifest.step} has no {name}"
            raise JobError(Problem(what, "train.optimizer", _AFRESH))
        if entry is None or tuple(entry.shape) != shard.shape:
            found = f"shape {tuple(entry.shape)}" if entry else "nothing of that name"
            what = f"the checkpoint of step {manifest.step} holds {found} where the model has {name} {shard.shape}"
            raise JobError(Problem(what, "model", _AFRESH))
    saved = read(storage, manifest, {name: shard.bounds() for name, shard in shards.items()})
    with torch.no_grad():
        for name, shard in shards.items():
            shard.take(saved[name])
