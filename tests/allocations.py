"""What torch's allocator had at the most, of real training: to hold against what was foretold."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dltrain.core.contracts import Batch
from dltrain.core.job import Job
from dltrain.core.parallel import microbatches_per_step
from dltrain.strategies.build import build_engine
from dltrain.training.recipes import load_recipe
from torch._C._profiler import _EventType


def measure(file: str, world: int) -> int:
    """As one of ``world`` ranks: train every cell of ``file`` for two steps; rank 0 writes the ranks' peaks beside it.

    A cell is ``{"job": …, "samples": {field: {"shape", "dtype"}}, "evaluated": samples}``.
    """
    torch.set_num_threads(1)
    found: list[list[int]] = []
    rank = int(os.environ["RANK"])
    store = dist.FileStore(f"{file}.store", world)
    for number, cell in enumerate(json.loads(Path(file).read_text())):
        if world > 1:  # with keys of its own: a group of the same name would find the last one's addresses
            mine = dist.PrefixStore(str(number), store)
            dist.init_process_group("gloo", store=mine, rank=rank, world_size=world)
        peaks = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
        peak = torch.tensor([_peak(cell, rank, world)])
        if world > 1:
            dist.all_gather(peaks, peak)
            _leave(cell["job"]["parallel"].get("strategy", ""))
        else:
            peaks = [peak]
        found.append([int(peak) for peak in peaks])
    if rank == 0:
        Path(file).with_suffix(".peaks").write_text(json.dumps(found))
    return 0


def _leave(strategy: str) -> None:
    if strategy.startswith("zero"):
        import deepspeed

        deepspeed.comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def _peak(cell: dict[str, Any], rank: int, world: int) -> int:
    """Bytes that this rank's tensors take at most while the engine is built, in two steps, and in an evaluation."""
    job = Job.model_validate(cell["job"])
    recipe = load_recipe(job)
    train = job.train
    count = microbatches_per_step(
        train.microbatches, global_batch=train.global_batch, world=world, parallel=job.parallel
    )
    own, samples = count // job.parallel.axes(world)["data"], -(-train.global_batch // count)
    gc.collect()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        torch.manual_seed(0)
        engine = build_engine(
            job,
            recipe,
            rank=rank,
            world=world,
            device=torch.device("cpu"),
            reseed=lambda *_: None,
            mark=lambda _: None,
        )
        batches = [_fields(cell, samples) for _ in range(own)]
        for step in range(2):
            engine.step([Batch(fields, step, index, 1 / count) for index, fields in enumerate(batches)], 1.0)
        del batches
        if cell["evaluated"]:
            with engine.evaluating():
                engine.evaluate(Batch(_fields(cell, cell["evaluated"]), 0, 0, 1.0))
        del engine
        gc.collect()
    return _highest(profile)


def _fields(cell: dict[str, Any], samples: int) -> dict[str, torch.Tensor]:
    made = {"int64": lambda shape: torch.randint(0, 3, shape), "float32": torch.randn}
    return {name: made[field["dtype"]]((samples, *field["shape"])) for name, field in cell["samples"].items()}


def _highest(profile: Any) -> int:
    """The most bytes that were allocated at once.

    Memory that gloo's threads free is not seen to be freed: it is counted until the next event. Such is what is left in
    the end though no tensor has it, and what is allocated again.
    """
    events: list[tuple[int, int, int]] = []
    nodes = list(profile.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag == _EventType.Allocation:
            events.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    events.sort()
    alive = {o.untyped_storage().data_ptr() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)}
    open_: dict[int, int] = {}
    unseen: set[int] = set()
    for number, (_, address, size) in enumerate(events):
        if size > 0:
            if address in open_:
                unseen.add(open_[address])
            open_[address] = number
        else:
            open_.pop(address, None)
    unseen |= {number for address, number in open_.items() if address not in alive}
    now = highest = 0
    for number, (_, _, size) in enumerate(events):
        highest = max(highest, now + size)
        if number not in unseen:
            now += size
    return highest
