"""One rank of ``strategies.py``'s step times: an engine, and the same model written by hand, in turn.

Both live in this process and share its process group. A quad is a block of the engine's steps, two blocks of the
hand-written ones, and a block of the engine's; the ratio of a quad's times is free of whatever slows the machine
steadily. Rank 0 prints as JSON, of each quad, the seconds of the engine's step and of the hand-written one, and the
processor time that they took on this rank.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from dltrain.core.contracts import Batch
from dltrain.core.job import Job
from dltrain.core.keys import derive
from dltrain.core.pulse import Pulse
from dltrain.models.transformer import TransformerRecipe
from dltrain.strategies.build import build_engine
from dltrain.strategies.schedule import rate
from strategy_twins import BETAS, CLIP, DECAY, LR, Data, Step, twin
from torch import Tensor

LENGTH, SAMPLES, MICROBATCHES, STEPS = 64, 4, 2, 1_000_000
WARM = 4


def ours(strategy: str, preset: str, tensor: int, data: Data) -> Step:
    """The engine's step, called as the loop calls it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = world // tensor
    job = Job.model_validate(
        {
            "recipe": "transformer",
            "model": {"preset": preset},
            "parallel": {"strategy": "ddp" if strategy == "reproducible" else strategy, "tensor": tensor},
            "numerics": "reproducible" if strategy == "reproducible" else "fast",
            "train": {
                "global_batch": SAMPLES * MICROBATCHES * groups,
                "microbatches": MICROBATCHES * groups,
                "steps": STEPS,
                "clip_norm": CLIP,
                "optimizer": {"lr": LR, "weight_decay": DECAY, "betas": list(BETAS)},
                "schedule": {"name": "cosine"},
            },
        }
    )

    def reseed(*words: int) -> None:
        torch.default_generator.manual_seed(derive(job.seed, "step", *words))

    pulse = Pulse.create()
    recipe = TransformerRecipe(**job.model)
    device = torch.device("cpu")
    engine = build_engine(job, recipe, rank=rank, world=world, device=device, reseed=reseed, mark=pulse.mark)
    first = rank // tensor * MICROBATCHES
    weight = 1 / (MICROBATCHES * groups)

    def step(number: int) -> Tensor:
        pulse.mark("data", number)
        batches = [Batch({"x": x, "y": y}, number, first + i, weight) for i, (x, y) in enumerate(data)]
        share = rate(job.train.schedule, step=number, total_steps=STEPS)
        return engine.step(batches, share).loss["transformer"] * groups

    return step


def main(
    strategy: str, preset: str, tensor: int, quads: int, block: int, theirs_first: bool, against_itself: bool
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    drawn = torch.Generator().manual_seed(dist.get_rank() // tensor)
    tokens = torch.randint(256, (MICROBATCHES, SAMPLES, LENGTH + 1), generator=drawn)
    data = [(text[:, :-1].contiguous(), text[:, 1:].contiguous()) for text in tokens]

    def hand() -> Step:
        model = TransformerRecipe(preset=preset).parts()["transformer"]
        return twin("tensor" if tensor > 1 else strategy, model, data, steps=STEPS)

    engine = partial(ours, strategy, preset, tensor, data)
    makers: list[Callable[[], Step]] = [hand if against_itself else engine, hand]
    steps: list[Step] = [_idle, _idle]
    for which in (1, 0) if theirs_first else (0, 1):
        torch.manual_seed(0)
        steps[which] = makers[which]()
    done = [0, 0]
    losses: list[Tensor] = [torch.zeros(()), torch.zeros(())]

    def timed(which: int, count: int) -> np.ndarray:
        """The seconds that some steps take, and those of this process's processor time."""
        dist.barrier()
        begin, busy = time.perf_counter(), time.process_time()
        for number in range(done[which], done[which] + count):
            losses[which] = steps[which](number)
        busy = time.process_time() - busy
        dist.barrier()
        done[which] += count
        return np.array([time.perf_counter() - begin, busy]) / count

    for which in (0, 1, 1, 0):
        timed(which, WARM)
    found: list[list[float]] = []
    for quad in range(quads):
        outer = quad % 2
        spent = np.zeros((2, 2))
        for which in (outer, 1 - outer, 1 - outer, outer):
            spent[:, which] += timed(which, block) / 2
        found.append(spent.ravel().tolist())
    if dist.get_rank() == 0:
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0.0, check_dtype=False)  # they have trained the same
        print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)


def _idle(number: int) -> Tensor:
    raise AssertionError("not made yet")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:6]), *(word == "1" for word in sys.argv[6:8]))
