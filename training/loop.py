"""The step loop: data, step, report; now and then evaluate, save, and agree whether to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from ..checkpoint.image import Images
from ..checkpoint.manifest import Manifest
from ..checkpoint.retention import EVALUATED, finite
from ..core.contracts import Batch, DrawsSamples
from ..core.elastic import settled
from ..core.errors import JobError, Problem
from ..core.job import Job
from ..core.keys import derive
from ..core.parallel import microbatches_per_step
from ..core.pulse import Pulse
from ..core.storage import Storage
from ..data.loader import Loader, eval_batches
from ..data.normalize import Normalizer
from ..data.order import StepPlan
from ..data.sources import open_source
from ..data.split import Subset, split_source
from ..strategies.build import build_engine
from ..strategies.schedule import rate
from .agree import Agreement, Wishes
from .context import Context
from .course import Course
from .due import Due
from .evaluate import evaluate
from .images import grid, png
from .memory import Memory, Position
from .meter import Meter
from .nonfinite import Guard
from .pace import Pace
from .persistence import Persister
from .recipes import load_recipe
from .reporter import Reporter
from .restoring import Restorer
from .snapshot import Snapshots

_LAST_SAVE = 3600.0  # seconds that a run which is complete waits for its last checkpoint
_SHARE_OF_GRACE = 0.8  # of the time to stop: the rest is for the words about it


@dataclass(frozen=True)
class Remembered:
    """What a generation of ranks goes on from where the one before has left a snapshot in memory.

    Attributes:
        saved: step of the newest checkpoint.
        interrupted: a checkpoint was being written when ranks were lost: one is due.
    """

    images: Images
    saved: int
    interrupted: bool


class Trainer:
    """One rank's whole training: built from the job, then :meth:`run` once."""

    def __init__(
        self,
        job: Job,
        *,
        ctx: Context,
        device: torch.device,
        storage: Storage,
        persister: Persister,
        memory: Memory,
        reporter: Reporter,
        pulse: Pulse,
    ) -> None:
        job = settled(job, ctx.local_world_size)
        self._job, self._ctx, self._device = job, ctx, device
        self._reporter, self._pulse = reporter, pulse
        world = ctx.world_size
        self._data_ranks = job.parallel.axes(world)["data"]
        self._place = job.parallel.place(ctx.rank, world)
        self._counts = job.parallel.counts(ctx.rank, world)
        self._source = open_source(job.data)
        self._parts = split_source(self._source, job.data.split)
        train = job.train
        self._plan = _step_plan(job, len(self._parts["train"]), world)
        self._meter = Meter(self._plan, pulse)
        self._guard = Guard(job, self._plan, self._source, self._parts["train"], ctx=ctx, reporter=reporter)
        self._normalizer: Normalizer | None = None
        self._course = Course(train, job.checkpoint)
        self._due = Due(job.checkpoint)
        self._evaluated: dict[str, float] = {}
        self._evaluate_every = train.evaluate_every or math.ceil(len(self._parts["train"]) / train.global_batch)
        torch.manual_seed(derive(job.seed, "weights"))
        recipe = load_recipe(job)
        self._draws = isinstance(recipe, DrawsSamples)
        self._engine = build_engine(
            job,
            recipe,
            rank=ctx.rank,
            world=world,
            device=device,
            reseed=partial(self._seed, "step"),
            mark=pulse.mark,
        )
        self._snapshots = Snapshots(persister, memory, rank=ctx.rank, world=world, reporter=reporter)
        self._restorer = Restorer(self._engine, job, ctx, storage, reporter)
        self._remembers: int | Literal["auto", "never"] = job.recovery.snapshot if memory.held else "never"

    def run(
        self,
        *,
        restore_urls: Sequence[str],
        tracking: dict[str, Any],
        init_from: str = "",
        remembered: Remembered | None = None,
    ) -> None:
        """Train to the end, or to the step at which all ranks agree to stop; save, and report how it ended."""
        self._tracking = tracking
        start = self._restore(restore_urls, init_from, remembered)
        self._say_setup(start)
        if remembered is not None and remembered.interrupted and self._snapshots.newest != start:
            self._save(start, self._plan.total_steps)
        done = self._steps(start)
        end = done if self._course.ended else self._plan.total_steps
        finished = done >= end
        metrics: dict[str, float] = {}
        if finished:
            metrics = self._evaluate("val") | self._evaluate("test")
            self._reporter.annotate(metrics)
            self._evaluated = metrics
            self._draw(done)
        if done > 0 and self._snapshots.newest != done:
            self._save(done, end)
        patience = _LAST_SAVE if finished else self._job.recovery.stop_grace * _SHARE_OF_GRACE
        self._snapshots.finish(patience, alive=partial(self._pulse.mark, "checkpoint"))
        self._reporter.sync()
        if self._ctx.rank == 0:
            status = "finished" if finished else "stopped"
            self._pulse.mark("end")
            self._reporter.send("end", status=status, step=done, metrics=metrics, spent=self._meter.between())

    def _restore(self, urls: Sequence[str], init_from: str, remembered: Remembered | None) -> int:
        """Load what there is to go on from, if anything, and settle the normalisation; the number of completed steps.

        Raises:
            JobError: it lies beyond the job's end.
        """
        self._pulse.mark("setup")
        if remembered is not None:
            restored = self._restorer.from_memory(remembered.images, saved=remembered.saved)
        else:
            restored = self._restorer.from_storage(urls)
        manifest = restored.manifest if restored is not None else None
        self._origin = "" if restored is None else "storage" if remembered is None else "memory"
        if restored is not None and restored.durable:
            self._snapshots.newest = restored.manifest.step
        if manifest is None and init_from:
            self._restorer.weights_from(init_from)
        if self._job.data.normalize:
            self._normalizer = (
                self._fit_normalizer()
                if manifest is None or "normalizer" not in manifest.extra
                else _saved_normalizer(manifest)
            )
        if manifest is None:
            return 0
        if manifest.step > self._plan.total_steps:
            what = f"the checkpoint is of step {manifest.step}, the job ends at step {self._plan.total_steps}"
            raise JobError(Problem(what, "train.steps" if self._job.train.steps else "train.epochs", "train longer"))
        self._course.load(cast(dict[str, Any], manifest.extra.get("course", {})))
        self._guard.load(cast(dict[str, int], manifest.extra.get("skipped", {})))
        return manifest.cursor.step

    def _fit_normalizer(self) -> Normalizer:
        """Rank 0 reads the training part once; all ranks take its figures."""
        box = [Normalizer.fit(self._source, self._parts["train"]).state() if self._ctx.rank == 0 else None]
        if self._ctx.world_size > 1:
            dist.broadcast_object_list(box)
        assert box[0] is not None
        return Normalizer.from_state(box[0])

    def _say_setup(self, start: int) -> None:
        if self._ctx.rank == 0:
            self._reporter.send(
                "setup",
                start=start,
                origin=self._origin,
                total_steps=self._plan.total_steps,
                parameters=self._engine.parameters,
                samples={name: len(indices) for name, indices in self._parts.items()},
                device=str(self._device),
            )

    def _steps(self, start: int) -> int:
        """Train from step ``start`` on; the number of completed steps."""
        agreement = Agreement(world=self._ctx.world_size, step=start)
        loader = Loader(
            Subset(self._source, self._parts["train"]),
            self._plan,
            rank=self._place["data"],
            data_ranks=self._data_ranks,
            normalizer=self._normalizer,
            start_step=start,
            prefetch=self._job.data.prefetch,
            workers=self._job.data.workers,
        )
        self._pace = Pace(self._remembers, start=start)
        try:
            batches = iter(loader)
            for step in range(start, self._plan.total_steps):
                if agreement.due(step):
                    self._reporter.sync()
                    agreed = agreement.ask(step, self._wishes())
                    if agreed.stop:
                        return step
                    if agreed.reassign:
                        self._snapshots.reassign()
                    self._pace.agree(agreed.every)
                    self._snapshots.agree_copies(agreed.copies)
                    if agreed.save and self._snapshots.newest != step:
                        self._save(step, self._plan.total_steps)
                self._evaluated = {}
                self._one_step(step, batches)
                self._after(step + 1)
                self._snapshots.poll()
                if self._course.ended:
                    return step + 1
        finally:
            loader.close()
        return self._plan.total_steps

    def _wishes(self) -> Wishes:
        return Wishes(
            stop=self._reporter.stop_requested,
            save=self._ctx.rank == 0 and self._due.by_clock(),
            reassign=self._snapshots.outdated,
            every=self._pace.wanted,
            copies=self._snapshots.copies,
        )

    def _one_step(self, step: int, batches: Iterator[list[Batch]]) -> None:
        train = self._job.train
        self._pulse.mark("data", step)
        self._meter.begin()
        begin = time.monotonic()
        microbatches = [_to(batch, self._device) for batch in next(batches)]
        wait = time.monotonic() - begin
        share = rate(train.schedule, step=step, total_steps=self._plan.total_steps, falls=self._course.falls)
        result = self._engine.step(microbatches, share)
        self._guard.take(step, result)
        self._meter.add(step, wait=wait)
        self._pace.stepped(time.monotonic() - begin)
        if (step + 1) % train.log_every == 0 or self._evaluates(step + 1):
            row = self._meter.row(step + 1, result, share * train.optimizer.lr, alone=len(self._engine.parts) == 1)
            row["metrics"] |= self._snapshots.figures()
            self._reporter.row(row | {"skipped_steps": self._guard.skipped(result)})

    def _after(self, done: int) -> None:
        """What comes between steps: evaluation, checkpoints at the steps the job names, and snapshots in memory."""
        if self._evaluates(done) and done < self._plan.total_steps:
            metrics = self._evaluate("val")
            self._reporter.annotate(metrics)
            self._evaluated = metrics
            self._course.take(metrics)
            self._draw(done)
        due = self._due.after(done) or (self._course.best and bool(self._evaluated))
        if done == self._plan.total_steps or self._course.ended:
            return
        if due:
            self._save(done, self._plan.total_steps)
        elif self._pace.due(done):
            self._remember(done)

    def _evaluates(self, done: int) -> bool:
        return done % self._evaluate_every == 0 or done == self._plan.total_steps

    def _evaluate(self, part: str) -> dict[str, float]:
        """The recipe's metrics over a part of the data, as ``part/name``; empty when the part has no samples."""
        if not len(self._parts[part]):
            return {}
        self._pulse.mark("evaluate")
        batches = eval_batches(
            self._source,
            self._parts[part],
            rank=self._place["data"],
            data_ranks=self._data_ranks,
            batch_size=self._job.train.evaluate_batch,
            normalizer=self._normalizer,
        )

        def seeded() -> Iterator[tuple[Batch, int]]:
            for batch, count in batches:
                self._pulse.mark("evaluate")
                self._seed("evaluate", batch.index)  # for metrics that draw
                yield _to(batch, self._device), count

        with self._engine.evaluating():
            found = evaluate(self._engine, seeded(), world=self._ctx.world_size, counts=self._counts)
        return {f"{part}/{name}": value for name, value in found.items()}

    def _draw(self, done: int) -> None:
        """Show what the recipe draws after ``done`` steps, if it draws: of the same random numbers every time."""
        if not self._draws:
            return
        self._seed("samples")
        with self._engine.evaluating():
            drawn = self._engine.samples()
        if self._ctx.rank == 0:
            for name, images in drawn.items():
                self._reporter.image(done, name, png(grid(images)))

    def _save(self, done: int, end: int) -> None:
        """Take a snapshot after ``done`` steps of ``end``, which becomes a checkpoint."""
        self._pulse.mark("checkpoint")
        self._engine.share_buffers()
        self._snapshots.save(self._engine, self._position(done, end), self._tracking)
        self._due.taken()

    def _remember(self, done: int) -> None:
        """Take a snapshot after ``done`` steps, which stays in memory."""
        self._pulse.mark("snapshot")
        begin = time.monotonic()
        self._engine.share_buffers()
        counts = self._snapshots.remember(self._engine, self._position(done, self._plan.total_steps), self._tracking)
        self._pace.taken(done, time.monotonic() - begin if counts else None)

    def _position(self, done: int, end: int) -> Position:
        extra: dict[str, Any] = {"course": self._course.state(), EVALUATED: finite(self._evaluated)}
        if skipped := self._guard.state():
            extra["skipped"] = skipped
        if self._normalizer is not None:
            extra["normalizer"] = self._normalizer.state()
        return Position(done, self._plan.samples_before(done), end, extra)

    def _seed(self, purpose: str, *words: int) -> None:
        key = derive(self._job.seed, purpose, *words)
        torch.default_generator.manual_seed(key)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index].manual_seed(key)


def _step_plan(job: Job, samples: int, world: int) -> StepPlan:
    """Which of the training part's ``samples`` each step of ``job`` takes on ``world`` ranks."""
    train = job.train
    return StepPlan(
        n=samples,
        seed=job.seed,
        global_batch=train.global_batch,
        microbatches=microbatches_per_step(
            train.microbatches, global_batch=train.global_batch, world=world, parallel=job.parallel
        ),
        epochs=train.epochs,
        steps=train.steps,
        last_step=train.last_step,
    )


def _saved_normalizer(manifest: Manifest) -> Normalizer:
    """The figures that the run began with, so that new data does not shift the inputs under the weights."""
    return Normalizer.from_state(cast(dict[str, float | list[float]], manifest.extra["normalizer"]))


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    fields = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.fields.items()}
    return Batch(fields, batch.step, batch.index, batch.weight)
