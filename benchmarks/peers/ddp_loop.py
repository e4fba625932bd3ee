"""The peer of ``benchmarks/step.py``: the digits CNN trained by a hand-written DDP loop, nothing reported.

    torchrun --standalone --nproc-per-node 2 benchmarks/peers/ddp_loop.py --batch 64 --out times

Each rank reads its share of each global batch from tensors that were normalised beforehand. Rank 0 keeps the time of
each step's end in the file ``times``, which it maps into its memory: eight bytes a step, and no system call.
"""

from __future__ import annotations

import argparse
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from dltrain.core.job import DataSpec
from dltrain.data.sources import open_source
from dltrain.models.cnn import Cnn, CnnConfig
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

MOST_STEPS = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64, help="samples per step over all ranks")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    source = open_source(DataSpec())
    fields = source.fetch(np.arange(len(source)))
    x, y = fields["x"], fields["y"]
    x = (x - x.mean()) / x.std()
    model = DistributedDataParallel(Cnn(CnnConfig(widths=args.widths)), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    share = args.batch // world
    times = np.memmap(args.out, np.float64, "w+", shape=(MOST_STEPS,)) if rank == 0 else np.zeros(MOST_STEPS)
    order = torch.randperm(len(x))
    for step in count():
        start = step * args.batch % (len(x) - args.batch) + rank * share
        picked = order[start : start + share]
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(model(x[picked]), y[picked])
        loss.backward()
        optimizer.step()
        times[step] = time.time()


if __name__ == "__main__":
    main()
