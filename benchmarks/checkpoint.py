"""What a checkpoint costs, against torch's own ways to write one.

    python benchmarks/checkpoint.py [--ranks 2] [--parameters 50 200] [--repeats 5]

The state is that of AdamW on replicas (weights and two moments in float32, 12 bytes a parameter), the storage a local
folder. In every repeat each way saves once, one after the other, in the same processes, and reads back what it wrote.
The first repeat is not counted: memory is touched for the first time in it.

stall: how long the call keeps a rank from its next step, of the slowest rank. durable: from the call until everything
is written and synced (torch.save syncs nothing, and is synced here). bytes: written per byte of state. load: every rank
reads the whole state; load by one: one process alone does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = ("dltrain", "dcp.save", "dcp.async_save", "torch.save")
TENSORS = 100


def measure(parameters: int, repeats: int) -> None:
    """Save and load as one rank; rank 0 prints the figures of each repeat as JSON."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from dltrain.checkpoint.reader import open_manifest, read
    from dltrain.core.contracts import Shard
    from dltrain.core.job import Job
    from dltrain.core.storage import Storage
    from dltrain.training.persistence import Persister
    from dltrain.training.reporter import StandaloneReporter
    from dltrain.training.snapshot import Position, Snapshots

    persister = Persister()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    width = parameters // TENSORS
    names = [f"{kind}.net.{i}" for kind in ("model", "optimizer", "moment") for i in range(TENSORS)]
    state = {name: torch.randn(width // 100, 100) for name in names}
    folder = Path.cwd()

    class Holder:
        def state(self) -> dict[str, Shard]:
            return {name: Shard(tuple(tensor.shape), (0, 0), tensor) for name, tensor in state.items()}

    persister.open(
        url=str(folder / "dltrain"), options={}, rank=rank, keep=2, best={"metric": None, "goal": "min"}, lease=""
    )
    storage = Storage(str(folder / "dltrain"))
    reporter = StandaloneReporter(rank=rank, world=world, run_dir=folder)
    snapshots = Snapshots(persister, storage, Job.model_validate({}), rank=rank, world=world, reporter=reporter)

    def ours(step: int) -> Callable[[], object]:
        engine: Any = Holder()
        snapshots.save(engine, Position(step, step, 1000, {}), {})
        return lambda: snapshots.finish(600)

    def synchronous(step: int) -> Callable[[], object]:
        dcp.save(state, checkpoint_id=folder / f"dcp.save-{step}")
        return lambda: None

    def asynchronous(step: int) -> Callable[[], object]:
        future: Any = dcp.async_save(state, checkpoint_id=folder / f"dcp.async_save-{step}")
        return future.result

    def plain(step: int) -> Callable[[], object]:
        if rank == 0:
            with (folder / f"torch.save-{step}").open("wb") as file:
                torch.save(state, file)
                os.fsync(file.fileno())
        dist.barrier()
        return lambda: None

    def load_ours(step: int) -> None:
        read(storage, open_manifest(storage, step))

    def load_dcp(way: str) -> Callable[[int], None]:
        def load(step: int) -> None:
            target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
            dcp.load(target, checkpoint_id=folder / f"{way}-{step}")

        return load

    def load_plain(step: int) -> None:
        torch.load(folder / f"torch.save-{step}")

    saves = dict(zip(WAYS, (ours, synchronous, asynchronous, plain), strict=True))
    loads = dict(zip(WAYS, (load_ours, load_dcp(WAYS[1]), load_dcp(WAYS[2]), load_plain), strict=True))
    for step in range(1, repeats + 2):
        figures: dict[str, dict[str, float]] = defaultdict(dict)
        for way in WAYS:
            os.sync()
            dist.barrier()
            begin = time.perf_counter()
            finish = saves[way](step)
            figures[way]["stall"] = time.perf_counter() - begin
            finish()
            figures[way]["durable"] = time.perf_counter() - begin
            dist.barrier()
            begin = time.perf_counter()
            loads[way](step)
            figures[way]["load"] = time.perf_counter() - begin
            dist.barrier()
            written = folder / (f"dltrain/step-{step:08d}" if way == "dltrain" else f"{way}-{step}")
            files = written.rglob("*") if written.is_dir() else [written]
            size = sum(file.stat().st_size for file in files if file.is_file())
            figures[way]["bytes"] = size / (4 * sum(tensor.numel() for tensor in state.values()))
            if way == "dltrain" and rank == 0:
                begin = time.perf_counter()
                loads[way](step)
                figures[way]["load by one"] = time.perf_counter() - begin
            elif way.startswith("dcp") and rank == 0:
                target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
                begin = time.perf_counter()
                dcp.load(target, checkpoint_id=written, no_dist=True)
                figures[way]["load by one"] = time.perf_counter() - begin
            dist.barrier()
            if rank == 0 and way != "dltrain":
                shutil.rmtree(written) if written.is_dir() else written.unlink()
        keys = [(way, name) for way in WAYS for name in ("stall", "durable", "load")]
        slowest = torch.tensor([figures[way][name] for way, name in keys])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        for (way, name), value in zip(keys, slowest.tolist(), strict=True):
            figures[way][name] = value
        if rank == 0 and step > 1:
            print(json.dumps(figures), flush=True)
    dist.barrier()
    os._exit(0)


def run(parameters: int, ranks: int, repeats: int, folder: Path) -> list[dict[str, dict[str, float]]]:
    """The figures of each repeat."""
    program = [str(Path(__file__).absolute()), "--rank-of", str(parameters), "--repeats", str(repeats)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory(prefix="bench", dir=folder) as own:
        done = subprocess.run(
            [*command, *program],
            cwd=own,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--parameters", type=int, nargs="+", default=[50, 200], help="in millions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the default is the temporary one")
    parser.add_argument("--rank-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        measure(args.rank_of, args.repeats)
    columns = ("stall", "durable", "bytes", "load", "load by one")
    for ranks in args.ranks:
        for millions in args.parameters:
            repeats = run(millions * 1_000_000, ranks, args.repeats, args.folder or Path(tempfile.gettempdir()))
            print(f"\n{millions}M parameters, {ranks} ranks\n\n| | {' | '.join(columns)} |\n|---|---|---|---|---|---|")
            for way in WAYS:
                cells = [_cell(column, [repeat[way].get(column) for repeat in repeats]) for column in columns]
                print(f"| {way} | {' | '.join(cells)} |", flush=True)
            stalls = [repeat["dltrain"]["stall"] / repeat["dcp.async_save"]["stall"] for repeat in repeats]
            print(f"\nstall, of async_save's: {statistics.median(stalls):.2f} ({min(stalls):.2f} to {max(stalls):.2f})")


def _cell(column: str, values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ""
    if column == "bytes":
        return f"{statistics.median(found):.3f}"
    return f"{statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})"


if __name__ == "__main__":
    main()
