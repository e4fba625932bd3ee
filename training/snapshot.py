"""Checkpoints from the rank's side: save together, restore together."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..checkpoint.manifest import CorruptCheckpoint, Manifest
from ..checkpoint.reader import catalogue, open_manifest
from ..checkpoint.retention import set_aside
from ..checkpoint.saving import Snapshot, description
from ..checkpoint.writer import PieceKey, assign, held, plan_shard
from ..core.contracts import Engine
from ..core.errors import DltrainError, JobError, Problem
from ..core.formats import is_url
from ..core.job import Job
from ..core.storage import Storage
from .filling import AFRESH, Filler, fill_all, fill_weights
from .persistence import Persister, PersisterLost
from .reporter import Reporter
from .staging import Stage, image_size

T = TypeVar("T")

_PATIENCE = 5.0  # seconds that the last checkpoint is waited for without a word
_HOPELESS = 60.0  # seconds that a failing storage is tried when training is over
_ANSWER = 10.0  # seconds that a persister has to let go of what it has not begun to write
_STAGES = 2
_STARTS = 5  # persisters that are tried for one snapshot


class SaveFailed(DltrainError):
    """A checkpoint could not be written; the older ones are untouched."""


@dataclass(frozen=True)
class Position:
    """Where in the job a checkpoint was taken: completed steps, samples consumed, and small facts to carry over."""

    step: int
    samples: int
    total_steps: int
    extra: dict[str, Any]


@dataclass
class _Staged:
    """A snapshot in this rank's memory: one of the stages holds its image."""

    step: int
    stage: int
    text: bytes
    starts: int = 0
    """How often a persister was started for it."""
    dropped: bool = False
    """The persister was told to give it up, as every rank's is."""


class Snapshots:
    """Takes snapshots of an engine's state, and has the persister make them durable in one storage folder.

    There is memory for two: the one that is being written, and the newest, which takes the place of an older one that
    waits. All ranks decide that alike, so that a checkpoint is of one step.

    Attributes:
        newest: step of the snapshot that was taken, or of the checkpoint in this folder that was restored, last; -1
            before.
    """

    def __init__(
        self, persister: Persister, storage: Storage, job: Job, *, rank: int, world: int, reporter: Reporter
    ) -> None:
        self._persister = persister
        self._storage = storage
        self._job = job
        self._rank, self._world = rank, world
        self._reporter = reporter
        self.newest = -1
        self._held: list[PieceKey] = []
        self._mine: list[PieceKey] = []
        self._save_id = ""
        self._stages: dict[int, Stage] = {}
        self._given: list[_Staged] = []
        self._skipped = 0
        self._trouble = ""
        self._failure = ""
        self._figures: dict[str, float] = {}

    def save(self, engine: Engine, position: Position, tracking: dict[str, Any]) -> None:
        """Copy this rank's part into memory; it is made durable in the background. Collective."""
        taken, begin = time.time(), time.perf_counter()
        self._reporter.sync()
        state = engine.state()
        holdings = held(state)
        self.poll()
        new, full, trouble = self._any(holdings != self._held, len(self._given) > 1, bool(self._trouble))
        if new:
            self._assign(holdings)
        if full or trouble:
            self._give_way(position.step, all_of_them=trouble)
        plan = plan_shard(state, self._mine)
        stage = self._free_stage(image_size(plan))
        self._stages[stage].fill(plan, state)
        facts = self._facts(position, tracking) if self._rank == 0 else None
        row = self._reporter.unsettled()
        image = memoryview(b"")  # it goes as a descriptor
        stall = time.perf_counter() - begin
        snapshot = Snapshot(
            position.step, self._save_id, self._rank, self._world, tuple(plan), image, facts, row, taken, stall
        )
        self.newest, self._failure, self._trouble = position.step, "", ""
        self._given.append(_Staged(position.step, stage, description(snapshot)))
        self._hand_over(self._given[-1])

    def figures(self) -> dict[str, float]:
        """As metrics, on rank 0: what the newest checkpoint that was completed since the last call has cost, and how
        many snapshots were given up so far, where there were more since.
        """
        figures, self._figures = self._figures, {}
        return figures

    def poll(self) -> None:
        """Take in what the persister says. Costs microseconds."""
        try:
            for message in self._persister.receive():
                self._take(message)
        except PersisterLost:
            if self._given:  # else there is nothing to start another for
                self._start_again()

    def finish(self, timeout: float, *, alive: Callable[[], None] = lambda: None) -> None:
        """Wait until the newest snapshot is durable. Collective.

        Args:
            alive: called about every second, so that nobody takes the wait for a stall.

        Raises:
            SaveFailed: it is not, after ``timeout`` seconds, or while the storage fails; or it could not be written (on
                every rank alike).
        """
        begin, told, since = time.monotonic(), self._rank != 0, 0.0
        while True:
            alive()
            waited = time.monotonic() - begin
            since = 0.0 if not self._trouble else since or waited
            hopeless = waited > timeout or (since > 0 and waited - since > _HOPELESS)
            pending, hopeless = self._any(bool(self._given), hopeless)
            if not pending or hopeless:
                break
            if waited > _PATIENCE and not told:
                told = True
                text = f"waiting for the checkpoint of step {self.newest} to be written (at most {timeout:g} s)"
                self._reporter.send("note", text=text)
            if self._given:
                self._persister.wait(1.0)
                self.poll()
        if self._given:
            self._drop(self._given)
            self._failure = self._trouble or f"not done after {time.monotonic() - begin:.0f} s"
        failures = [f"rank {rank}: {why}" for rank, why in enumerate(self._all(self._failure)) if why]
        if failures:
            raise SaveFailed(f"checkpoint of step {self.newest} not written: " + "; ".join(failures))

    def _take(self, message: dict[str, Any]) -> None:
        match message["t"]:
            case "say":
                said = dict(message["message"])
                self._reporter.send(said.pop("t"), **said)
            case "trouble":
                self._trouble = message["why"]
            case "ended":
                self._end(message["step"], message["why"])
                self._figures |= {f"checkpoint/{name}": value for name, value in message["cost"].items()}
            case other:
                raise ValueError(f"the persister sent a message of kind {other!r}")

    def _give_way(self, step: int, *, all_of_them: bool) -> None:
        """Give up the newest snapshot, which waits on some rank, or all that are given. No rank may write it then."""
        self._skipped += 1
        if self._rank == 0:
            self._figures["checkpoint/skipped"] = self._skipped
        if self._rank == 0 and not all_of_them and self._skipped.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, ...
            what = f"checkpoint of step {self.newest} was skipped for that of step {step}"
            why = "the storage is slower than 'checkpoint.every'"
            self._reporter.send("note", text=f"{what}, since {why} ({self._skipped} skipped so far)")
        self._drop([staged for staged in self._given if all_of_them or staged.step == self.newest])

    def _drop(self, given: Sequence[_Staged]) -> None:
        for staged in given:
            staged.dropped = True
            with contextlib.suppress(PersisterLost):  # as poll() will find
                self._persister.drop(staged.step)

    def _assign(self, holdings: list[PieceKey]) -> None:
        """Settle who writes what. It is the same until tensors come or go, as the optimizer's do in the first step."""
        everyone = self._all((holdings, secrets.token_hex(4)))
        self._held, self._mine = holdings, assign([keys for keys, _ in everyone])[self._rank]
        self._save_id = everyone[0][1]

    def _free_stage(self, size: int) -> int:
        """The index of a stage of ``size`` bytes that is not in use.

        The persister answers at once that it lets go of what it has not begun to write.
        """
        deadline = time.monotonic() + _ANSWER
        while len(self._given) == _STAGES:
            if time.monotonic() > deadline:
                self._start_again()
            self._persister.wait(1.0)
            self.poll()
        taken = {staged.stage for staged in self._given}
        free = next(index for index in range(_STAGES) if index not in taken)
        before = self._stages.get(free)
        if before is None or before.size < size:
            self._stages[free] = Stage(size)
            if before is not None:
                before.close()
        return free

    def _facts(self, position: Position, tracking: dict[str, Any]) -> dict[str, Any]:
        return {
            "total_steps": position.total_steps,
            "samples": position.samples,
            "job": self._job.model_dump(mode="json"),
            "rng": {"seed": self._job.seed},
            "tracking": tracking,
            "extra": position.extra,
        }

    def _hand_over(self, staged: _Staged) -> None:
        with contextlib.suppress(PersisterLost):  # as the next poll() will find
            self._persister.save(staged.step, self._stages[staged.stage].fd, staged.text)

    def _start_again(self) -> None:
        """Start another persister, and give it what the lost one had: its memory is still here."""
        what = f"rank {self._rank}: the process that writes checkpoints was lost; started again"
        self._reporter.send("note", text=what)
        self._persister.restart()
        for staged in list(self._given):
            staged.starts += 1
            if staged.starts <= _STARTS and not staged.dropped:
                self._hand_over(staged)
            else:
                self._end(staged.step, f"the process that writes checkpoints was lost {staged.starts} times")

    def _end(self, step: int, why: str) -> None:
        """Note that the persister is done with a snapshot, or with trying; ``why`` it did not succeed."""
        for staged in [staged for staged in self._given if staged.step == step]:
            self._given.remove(staged)
            if why and not staged.dropped:  # other ranks' parts of it are of no use: they hear of that at the next save
                self._trouble = why
            if step == self.newest:
                self._failure = why
            if not why:
                self._trouble = ""

    def _any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank."""
        if self._world == 1:
            return list(flags)
        answer = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in answer.tolist()]

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
            manifest = self._load_newest(storage, engine, fill_all, where="checkpoint.to")
            if manifest is not None:
                if str(storage) == str(self._storage):
                    self.newest = manifest.step
                    if self._rank == 0:
                        set_aside(storage, after=manifest.step)
                return manifest
        return None

    def initialize(self, engine: Engine, url: str) -> None:
        """Take only the weights from the newest whole checkpoint in the folder ``url``.

        Raises:
            JobError: they do not fit the model, or no checkpoint there is whole.
        """
        storage = Storage(url, self._job.checkpoint.options if is_url(url) else None)
        names = {name for names in self._all([*engine.state()]) for name in names if name.startswith("model.")}
        self._load_newest(storage, engine, partial(fill_weights, names=names), where="--init-from")

    def _load_newest(self, storage: Storage, engine: Engine, fill: Filler, *, where: str) -> Manifest | None:
        """Load the newest checkpoint that is whole with ``fill``; None where there is none at all."""
        newest: str | None = None
        for step in self._all([entry.step for entry in catalogue(storage)] if self._rank == 0 else [])[0]:
            failure: str | None = None
            manifest: Manifest | None = None
            try:
                manifest = open_manifest(storage, step)
                engine.load(partial(fill, storage, manifest))
            except (CorruptCheckpoint, OSError) as error:
                failure = f"rank {self._rank}: {error}"
            failures = [item for item in self._all(failure) if item is not None]
            if not failures:
                return manifest
            if self._rank == 0:
                self._reporter.send("note", text=f"checkpoint of step {step} is not usable: {failures[0]}")
            newest = newest or failures[0]
        if newest is not None:
            raise JobError(Problem(f"no checkpoint in {storage} is usable: {newest}", where, AFRESH))
        return None

    def _all(self, value: T) -> list[T]:
        """Every rank's ``value``, in rank order."""
        if self._world == 1:
            return [value]
        gathered: list[T | None] = [None] * self._world
        dist.all_gather_object(gathered, value)
        return gathered  # pyright: ignore[reportReturnType]  # each place is filled
