"""One rank of ``strategies.py``'s memory table: trains a perceptron of 21 million parameters with AdamW.

It trains three steps, has the kernel forget its peak (/proc/self/clear_refs), and trains three more. Rank 0 prints, as
JSON, the largest rank's resident memory above what it had before the model was built, in bytes: between steps, and at
the peak within them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from dltrain.core.contracts import Batch, Layout, Recipe
from dltrain.core.job import Job
from dltrain.strategies.build import build_engine
from torch import Tensor, nn

WIDTH, LAYERS, SAMPLES = 1024, 20, 8
WEIGHTS = 4 * LAYERS * (WIDTH * WIDTH + WIDTH)  # bytes
#: DeepSpeed lets gathered weights go at once with large models only, unless it is told to.
NATIVE = {
    "zero_optimization": {
        "stage3_max_live_parameters": 3_000_000,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 1_100_000,
        "stage3_param_persistence_threshold": 10_000,
    }
}


class Deep(Recipe):
    """Square layers, each of them a unit; a tensor group cuts them by columns and by rows in turn."""

    def parts(self) -> dict[str, nn.Module]:
        layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS))
        return {"deep": nn.Sequential(*layers)}

    def layout(self, part: str) -> Layout:
        cut = {f"{layer}.0": "row" if layer % 2 else "column" for layer in range(LAYERS)}
        return Layout(units=tuple(map(str, range(LAYERS))), tensor=cut)

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return parts[part](batch["x"]).square().mean()


def resident(field: str = "VmRSS") -> int:
    """This process's resident memory now, or at its peak (``VmHWM``), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def train(strategy: str, tensor: int) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    zero = strategy.startswith("zero")
    if zero:
        Path(f"native{rank}.json").write_text(json.dumps(NATIVE))
    numerics, strategy = ("reproducible", "ddp") if strategy == "reproducible" else ("fast", strategy)
    parallel = {"strategy": strategy, "tensor": tensor, "deepspeed": f"native{rank}.json" if zero else None}
    data = world // tensor
    batches = {"global_batch": SAMPLES * data, "microbatches": data}
    job = Job.model_validate({"parallel": parallel, "numerics": numerics, "train": batches})
    if zero:
        import deepspeed  # noqa: F401  # its code is not what is measured
        from deepspeed.runtime.zero.muon import original_muon  # noqa: F401
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel

    dist.barrier()
    before = resident()
    torch.manual_seed(0)
    engine = build_engine(
        job, Deep(), rank=rank, world=world, device=torch.device("cpu"), reseed=lambda *_: None, mark=lambda _: None
    )
    for step in range(6):
        if step == 3:
            Path("/proc/self/clear_refs").write_text("5")
        engine.step([Batch({"x": torch.randn(SAMPLES, WIDTH)}, step, rank // tensor, 1 / data)], 1.0)
        dist.barrier()
    mine = torch.tensor([resident() - before, resident("VmHWM") - before])
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    if rank == 0:
        print(json.dumps([WEIGHTS, *mine.tolist()]), flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
