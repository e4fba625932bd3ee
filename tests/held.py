"""A rank program that says how much of a job's state its engine holds, and would read of a checkpoint."""

from __future__ import annotations

import json
import math

import torch
import torch.distributed as dist
from dltrain.core.config import load_job
from dltrain.core.contracts import ShardedState
from dltrain.strategies.build import build_engine
from dltrain.training.recipes import load_recipe


def say_what_is_held(*overrides: str) -> int:
    """Print ``{"held": elements, "whole": elements}`` of the weights and the optimizer's state; and "parameters"."""
    dist.init_process_group("gloo")
    job = load_job(None, overrides, {}, {}).job
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = build_engine(
        job,
        load_recipe(job),
        rank=rank,
        world=world,
        device=torch.device("cpu"),
        reseed=lambda step, microbatch, part: None,
        mark=lambda phase: None,
    )

    def count(shards: ShardedState) -> None:
        held = sum(shard.data.numel() for shard in shards.values())
        whole = sum(math.prod(shard.shape) for shard in shards.values())
        print(json.dumps({"held": held, "whole": whole, "parameters": engine.parameters}), flush=True)

    engine.load(count)
    dist.barrier()
    return 0
