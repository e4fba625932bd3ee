"""Checkpoints of every strategy under every other: the ways to spread a job, and the rank program that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from dltrain.checkpoint.writer import assign, commit, held, make_manifest, write_shard
from dltrain.core.config import load_job
from dltrain.core.contracts import ShardedState
from dltrain.core.job import Job
from dltrain.core.pulse import Pulse
from dltrain.core.storage import Storage
from dltrain.strategies.build import build_engine
from dltrain.training.context import context
from dltrain.training.loop import Trainer
from dltrain.training.memory import Memory
from dltrain.training.persistence import Persister
from dltrain.training.recipes import load_recipe
from dltrain.training.reporter import StandaloneReporter
from dltrain.training.restoring import Restorer

T = TypeVar("T")

#: Ranks, and the job's overrides, by name.
SETUPS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp × 1": (1, ()),
    "ddp × 4": (4, ()),
    "fsdp × 2": (2, ("parallel.strategy=fsdp",)),
    "fsdp × 4": (4, ("parallel.strategy=fsdp",)),
    "zero1 × 2": (2, ("parallel.strategy=zero1",)),
    "zero2 × 4": (4, ("parallel.strategy=zero2",)),
    "zero3 × 2": (2, ("parallel.strategy=zero3",)),
    "zero3 × 4": (4, ("parallel.strategy=zero3",)),
    "tensor × 2": (2, ("parallel.tensor=2",)),
    "pipeline × 2": (2, ("parallel.pipeline=2",)),
    "fsdp × 2, tensor × 2": (4, ("parallel.strategy=fsdp", "parallel.tensor=2")),
}


def go_on(origins: dict[str, str], *overrides: str) -> int:
    """For each checkpoint folder of ``origins``: load it and save it again, then train to the job's end from it.

    In the folder of an origin's name, ``again`` is the checkpoint that was saved, and ``run`` the run.
    """
    ctx = context()
    persisters = [Persister() for _ in origins]  # forks, while there are no threads
    if ctx.world_size > 1:
        dist.init_process_group("gloo")
    job = load_job(None, overrides, {}, {}).job
    for persister, (name, folder) in zip(persisters, origins.items(), strict=True):
        reporter = StandaloneReporter(rank=ctx.rank, world=ctx.world_size, run_dir=_made(Path(name, "run")))
        again = Storage(str(Path(name, "again").absolute()))
        best = {"metric": None, "goal": "min"}
        url = str(Path(name, "run", "checkpoints").absolute())
        persister.open(url=url, options={}, rank=ctx.rank, keep=3, best=best, lease="")
        _save_again(job, folder, again, reporter)
        trainer = Trainer(
            job,
            ctx=ctx,
            device=torch.device("cpu"),
            storage=Storage(url),
            persister=persister,
            memory=Memory(job, ctx, hold=None),
            reporter=reporter,
            pulse=Pulse.create(),
        )
        trainer.run(restore_urls=[folder], tracking={})
        persister.close()
        reporter.close(10)
    if ctx.world_size > 1:
        dist.barrier()
    return 0


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save_again(job: Job, origin: str, target: Storage, reporter: StandaloneReporter) -> None:
    """Load a checkpoint into an engine full of nonsense, and save what the engine holds then."""
    rank, world = context().rank, context().world_size
    engine = build_engine(
        job,
        load_recipe(job),
        rank=rank,
        world=world,
        device=torch.device("cpu"),
        reseed=lambda *_: None,
        mark=lambda _: None,
    )
    engine.load(_nonsense)
    restored = Restorer(engine, job, context(), target, reporter).from_storage([origin])
    assert restored is not None, "there is a checkpoint"
    manifest = restored.manifest
    state = engine.state()
    mine = assign(_everyones(held(state), world))[rank]
    records = write_shard(target, manifest.step, rank, world, state, mine)
    everyones = [record for each in _everyones(records, world) for record in each]
    if rank == 0:
        commit(
            target,
            make_manifest(everyones, step=manifest.step, total_steps=20, samples=0, world=world, job=manifest.job),
        )


def _nonsense(shards: ShardedState) -> None:
    for shard in shards.values():
        shard.data.fill_(7)


def _everyones(value: T, world: int) -> list[T]:
    found: list[Any] = [value] * world
    if world > 1:
        dist.all_gather_object(found, value)
    return found
