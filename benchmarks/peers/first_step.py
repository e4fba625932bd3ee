"""What every launcher of ``benchmarks/launch.py`` runs: a DDP step, and the time at which it was done.

Rank 0 writes the Unix time after its first optimizer step to ``<out>/first``. Then the ranks wait until ``<out>/go``
appears, so that their memory can be counted while all of them are there.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def main(out: Path) -> None:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():  # Ray Train has done it
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(256, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(32, 256)).sum().backward()
    optimizer.step()
    if dist.get_rank() == 0:
        stamp = out / "first.partial"
        stamp.write_text(repr(time.time()))
        stamp.rename(out / "first")
    while not (out / "go").exists():
        time.sleep(0.02)
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # interpreter teardown can hang in gloo's threads, under every launcher
