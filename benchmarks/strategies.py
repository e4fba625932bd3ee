"""Memory per rank under each strategy, on a model of 21 million parameters with AdamW.

    python benchmarks/strategies.py [--ranks 2 4] [--strategies ddp zero1 zero2 zero3]

Each cell is a launch of its own under torchrun: fresh processes on the CPU. A rank trains three steps, has the kernel
forget its peak (/proc/self/clear_refs), and trains three more. Printed is the largest rank's resident memory above what
it had before the model was built, between steps and at the peak within them; in copies of the model's float32 weights
beside it. ZeRO's stage 3 is told to let gathered weights go at once, which by default it does with large models only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

WIDTH, LAYERS, SAMPLES = 1024, 20, 8
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
NATIVE = {
    "zero_optimization": {
        "stage3_max_live_parameters": 3_000_000,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 1_100_000,
        "stage3_param_persistence_threshold": 10_000,
    }
}


def resident(field: str = "VmRSS") -> int:
    """This process's resident memory now, or at its peak (``VmHWM``), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def train(strategy: str) -> None:
    """Train as one rank; rank 0 prints the largest rank's figures as JSON."""
    import torch
    import torch.distributed as dist
    from dltrain.core.contracts import Batch, Recipe
    from dltrain.core.job import Job
    from dltrain.strategies.build import build_engine
    from torch import Tensor, nn

    class Deep(Recipe):
        def parts(self) -> dict[str, nn.Module]:
            layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS))
            return {"deep": nn.Sequential(*layers)}

        def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
            return parts[part](batch["x"]).square().mean()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    parallel = {"strategy": strategy, "deepspeed": None if strategy == "ddp" else "native.json"}
    job = Job.model_validate({"parallel": parallel, "train": {"global_batch": SAMPLES * world}})
    if strategy != "ddp":
        import deepspeed  # noqa: F401  # its code is not what is measured
        import torch._dynamo
        from deepspeed.runtime.zero.muon import original_muon  # noqa: F401
    dist.barrier()
    before = resident()
    torch.manual_seed(0)
    engine = build_engine(
        job, Deep(), rank=rank, world=world, device=torch.device("cpu"), reseed=lambda *_: None, mark=lambda _: None
    )
    for step in range(6):
        if step == 3:
            Path("/proc/self/clear_refs").write_text("5")
        engine.step([Batch({"x": torch.randn(SAMPLES, WIDTH)}, step, rank, 1 / world)], 1.0)
        dist.barrier()
    mine = torch.tensor([resident() - before, resident("VmHWM") - before])
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    if rank == 0:
        print(json.dumps(mine.tolist()), flush=True)
    dist.barrier()
    os._exit(0)


def measure(strategy: str, ranks: int) -> tuple[int, int]:
    """Bytes between steps, and at the peak within them."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        (Path(folder) / "native.json").write_text(json.dumps(NATIVE))
        program = [str(Path(__file__).absolute()), "--rank-of", strategy]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        # Without this threshold, freed tensors would stay with the process, some here and some there.
        settings = {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        }
        done = subprocess.run(
            [*command, *program], cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    between, peak = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    return between, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--rank-of", choices=STRATEGIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        train(args.rank_of)
    weights = 4 * LAYERS * (WIDTH * WIDTH + WIDTH)
    print(f"weights: {weights / 2**20:.0f} MiB\n")
    print("| ranks | strategy | between steps | peak in a step | of ddp's |\n|---|---|---|---|---|")
    for ranks in args.ranks:
        base: int | None = None
        for strategy in args.strategies:
            between, peak = measure(strategy, ranks)
            base = peak if strategy == "ddp" else base
            share = f"{peak / base:.0%}" if base else "not measured"
            cells = [f"{size / 2**20:.0f} MiB, {size / weights:.1f} ×" for size in (between, peak)]
            print(f"| {ranks} | {strategy} | {cells[0]} | {cells[1]} | {share} |", flush=True)


if __name__ == "__main__":
    main()
