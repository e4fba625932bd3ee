"""Peak memory of a rank while a Transformer of 124 million parameters is built and dealt to the ranks.

    python benchmarks/building.py [--ranks 2] [--strategies ddp fsdp zero3]

Each cell is a launch of its own under torchrun, on the CPU. Printed is the largest rank's peak of resident memory above
what it had before, until the engine is ready for its first step; and what it has then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

STRATEGIES = ("ddp", "fsdp", "zero3")


def resident(field: str) -> int:
    """This process's resident memory now (``VmRSS``) or at its peak (``VmHWM``), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def build(strategy: str) -> None:
    """Build as one rank; rank 0 prints the largest rank's figures as JSON."""
    import torch
    import torch._dynamo
    import torch.distributed as dist
    from dltrain.core.job import Job
    from dltrain.models.transformer import TransformerRecipe
    from dltrain.strategies.build import build_engine

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if strategy == "zero3":
        import deepspeed  # noqa: F401  # its code is not what is measured
        from deepspeed.runtime.zero.muon import original_muon  # noqa: F401
    job = Job.model_validate({"parallel": {"strategy": strategy}})
    recipe = TransformerRecipe(preset="125m")
    dist.barrier()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    torch.manual_seed(0)
    engine = build_engine(
        job, recipe, rank=rank, world=world, device=torch.device("cpu"), reseed=lambda *_: None, mark=lambda _: None
    )
    mine = torch.tensor([resident("VmHWM") - before, resident("VmRSS") - before])
    del engine
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    if rank == 0:
        print(json.dumps(mine.tolist()), flush=True)
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--rank-of", choices=STRATEGIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        build(args.rank_of)
    print("| ranks | strategy | peak | once built |\n|---|---|---|---|")
    for strategy in args.strategies:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        # Without this threshold, freed tensors would stay with the process, some here and some there.
        settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
        program = [str(Path(__file__).absolute()), "--rank-of", strategy]
        done = subprocess.run(
            [*launch, *program], env=os.environ | settings, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
        peak, built = (f"{figure / 2**20:.0f} MiB" for figure in figures)
        print(f"| {args.ranks} | {strategy} | {peak} | {built} |", flush=True)


if __name__ == "__main__":
    main()
