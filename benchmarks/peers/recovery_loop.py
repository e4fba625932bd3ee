"""What torchrun and Ray Train run in ``benchmarks/recovery.py``: a DDP loop that saves every 20 steps and resumes.

``recovery_recipe.py`` is the same as a job. Rank 0 writes a line with step and Unix time whenever it begins a step, and
every rank leaves its process id in ``pid-<rank>``.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

PAUSE = 0.02
EVERY = 20
SAMPLES = 32  # of a rank in a step
WIDTH = 256


def main(out: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(1)
    if not dist.is_initialized():  # Ray Train has done it
        dist.init_process_group("gloo", store=_store(dist) if "--prefix" in sys.argv else None, **_place())
    rank = dist.get_rank()
    (out / f"pid-{rank}").write_text(str(os.getpid()))
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    saved = out / "checkpoint.pt"
    step = 0
    if saved.exists():
        state = torch.load(saved)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    with (out / "stamps").open("a", buffering=1) as stamps:
        while True:
            if rank == 0:
                stamps.write(f"{step} {time.time()!r}\n")
            draw = torch.Generator().manual_seed(step * 1000 + rank)
            x = torch.randn(SAMPLES, WIDTH, generator=draw)
            y = torch.randint(0, 10, (SAMPLES,), generator=draw)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            time.sleep(PAUSE)
            step += 1
            if rank == 0 and step % EVERY == 0:
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, saved.with_suffix(".partial"))
                saved.with_suffix(".partial").replace(saved)


def _place() -> dict[str, int]:
    """Rank and world, where the store is ours."""
    if "--prefix" not in sys.argv:
        return {}
    return {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def _store(dist: object) -> object:
    """The elastic agent's store, without the keys of earlier starts: gloo would read their addresses."""
    from torch.distributed import PrefixStore, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))
    return PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
