"""The step loop: data, step, report; now and then evaluate, save, and agree whether to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist

from ..checkpoint.manifest import Manifest
from ..checkpoint.retention import EVALUATED, finite
from ..core.contracts import Batch, DrawsSamples, StepResult
from ..core.elastic import settled
from ..core.errors import JobError, Problem
from ..core.job import Job
from ..core.keys import derive
from ..core.parallel import microbatches_per_step
from ..core.pulse import Pulse
from ..core.rows import Row
from ..core.storage import Storage
from ..data.loader import Loader, eval_batches
from ..data.normalize import Normalizer
from ..data.order import StepPlan
from ..data.sources import open_source
from ..data.split import Subset, split_source
from ..strategies.build import build_engine
from ..strategies.schedule import rate
from .agree import Agreement
from .context import Context
from .course import Course
from .due import Due
from .evaluate import evaluate
from .images import grid, png
from .nonfinite import Guard
from .persistence import Persister
from .recipes import load_recipe
from .reporter import Reporter
from .snapshot import Position, Snapshots

_LAST_SAVE = 3600.0  # seconds that a run which is complete waits for its last checkpoint
_SHARE_OF_GRACE = 0.8  # of the time to stop: the rest is for the words about it


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
        reporter: Reporter,
        pulse: Pulse,
    ) -> None:
        asked, job = job, settled(job, ctx.local_world_size)
        self._job, self._ctx, self._device = job, ctx, device
        self._reporter, self._pulse = reporter, pulse
        world = ctx.world_size
        self._data_ranks = job.parallel.axes(world)["data"]
        self._place = job.parallel.place(ctx.rank, world)
        self._counts = job.parallel.counts(ctx.rank, world)
        self._source = open_source(job.data)
        self._parts = split_source(self._source, job.data.split)
        train = job.train
        self._plan = StepPlan(
            n=len(self._parts["train"]),
            seed=job.seed,
            global_batch=train.global_batch,
            microbatches=microbatches_per_step(
                train.microbatches, global_batch=train.global_batch, world=world, parallel=job.parallel
            ),
            epochs=train.epochs,
            steps=train.steps,
            last_step=train.last_step,
        )
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
        self._snapshots = Snapshots(persister, storage, asked, rank=ctx.rank, world=world, reporter=reporter)

    def run(self, *, restore_urls: Sequence[str], tracking: dict[str, Any], init_from: str = "") -> None:
        """Train to the end, or to the step at which all ranks agree to stop; save, and report how it ended."""
        self._tracking = tracking
        start = self._restore(restore_urls, init_from)
        self._say_setup(start)
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
            self._reporter.send("end", status=status, step=done, metrics=metrics)

    def _restore(self, urls: Sequence[str], init_from: str) -> int:
        """Load the newest checkpoint, if there is one, and settle the normalisation; the number of completed steps.

        Raises:
            JobError: the checkpoint lies beyond the job's end.
        """
        self._pulse.mark("setup")
        manifest = self._snapshots.restore(self._engine, urls)
        if manifest is None and init_from:
            self._snapshots.initialize(self._engine, init_from)
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
        meter = _Meter(self._plan)
        try:
            batches = iter(loader)
            for step in range(start, self._plan.total_steps):
                if agreement.due(step):
                    self._reporter.sync()
                    due = self._ctx.rank == 0 and self._due.by_clock()
                    stop, save = agreement.ask(step, stop=self._reporter.stop_requested, save=due)
                    if stop:
                        return step
                    if save and self._snapshots.newest != step:
                        self._save(step, self._plan.total_steps)
                self._evaluated = {}
                self._one_step(step, batches, meter)
                self._after(step + 1)
                self._snapshots.poll()
                if self._course.ended:
                    return step + 1
        finally:
            loader.close()
        return self._plan.total_steps

    def _one_step(self, step: int, batches: Iterator[list[Batch]], meter: _Meter) -> None:
        train = self._job.train
        self._pulse.mark("data", step)
        begin = time.monotonic()
        microbatches = [_to(batch, self._device) for batch in next(batches)]
        wait = time.monotonic() - begin
        share = rate(train.schedule, step=step, total_steps=self._plan.total_steps, falls=self._course.falls)
        result = self._engine.step(microbatches, share)
        self._guard.take(step, result)
        meter.add(step, seconds=time.monotonic() - begin, wait=wait)
        if (step + 1) % train.log_every == 0 or self._evaluates(step + 1):
            row = meter.row(step + 1, result, share * train.optimizer.lr, alone=len(self._engine.parts) == 1)
            row["metrics"] |= self._snapshots.figures()
            self._reporter.row(row | {"skipped_steps": self._guard.skipped(result)})

    def _after(self, done: int) -> None:
        """What comes between steps: evaluation and checkpoints at the steps the job names."""
        if self._evaluates(done) and done < self._plan.total_steps:
            metrics = self._evaluate("val")
            self._reporter.annotate(metrics)
            self._evaluated = metrics
            self._course.take(metrics)
            self._draw(done)
        due = self._due.after(done) or (self._course.best and bool(self._evaluated))
        if due and done < self._plan.total_steps and not self._course.ended:
            self._save(done, self._plan.total_steps)

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
        """Take a snapshot after ``done`` steps of ``end``."""
        self._pulse.mark("checkpoint")
        self._engine.share_buffers()
        extra: dict[str, Any] = {"course": self._course.state(), EVALUATED: finite(self._evaluated)}
        if skipped := self._guard.state():
            extra["skipped"] = skipped
        if self._normalizer is not None:
            extra["normalizer"] = self._normalizer.state()
        position = Position(done, self._plan.samples_before(done), end, extra)
        self._snapshots.save(self._engine, position, self._tracking)
        self._due.taken()

    def _seed(self, purpose: str, *words: int) -> None:
        key = derive(self._job.seed, purpose, *words)
        torch.default_generator.manual_seed(key)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index].manual_seed(key)


class _Meter:
    """Adds up step times between two rows of metrics."""

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        self._clear()

    def _clear(self) -> None:
        self._steps, self._samples, self._seconds, self._wait = 0, 0, 0.0, 0.0

    def add(self, step: int, *, seconds: float, wait: float) -> None:
        self._steps += 1
        self._samples += self._plan.samples_before(step + 1) - self._plan.samples_before(step)
        self._seconds += seconds
        self._wait += wait

    def row(self, done: int, result: StepResult, lr: float, *, alone: bool) -> Row:
        """This rank's row after ``done`` steps; the sums begin anew."""
        row: Row = {
            "step": done,
            "loss": {part: float(loss) for part, loss in result.loss.items()},
            "norm": {part: float(norm) for part, norm in result.grad_norm.items()},
            "loss_scale": {part: found.factor for part, found in result.scaling.items()},
            "alone": alone,
            "samples": self._samples,
            "steps": self._steps,
            "seconds": self._seconds,
            "wait": self._wait,
            "at": time.time(),
            "lr": lr,
            "epoch": self._plan.samples_before(done) / self._plan.n,
            "metrics": {},
        }
        self._clear()
        return row


def _saved_normalizer(manifest: Manifest) -> Normalizer:
    """The figures that the run began with, so that new data does not shift the inputs under the weights."""
    return Normalizer.from_state(cast(dict[str, float | list[float]], manifest.extra["normalizer"]))


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    fields = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.fields.items()}
    return Batch(fields, batch.step, batch.index, batch.weight)
