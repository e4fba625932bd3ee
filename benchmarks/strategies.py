"""What each strategy costs: the time of a step against the same model written by hand, and memory per rank.

    python benchmarks/strategies.py [time memory] [--strategies ddp reproducible fsdp tensor zero1 zero2 zero3]

Every cell is a launch of its own under torchrun: fresh processes on the CPU, of one thread each. Prints Markdown.

time: two ranks train the same Transformer (``strategy_steps.py``) with an engine of dltrain's, and by a loop on torch
or DeepSpeed alone (``strategy_twins.py``). Both are in the same two processes and take turns, a few steps each, so that
what else the machine does hits both alike; that they train alike is checked at the end. A start has new processes,
since a process keeps what luck it has with its memory's layout, and the two are built in turn in the other order. Shown
are medians, and the quartiles of the ratios of neighbours in time. 'reproducible' is ddp with numerics: reproducible,
against the hand-written ddp. In the last line that one is measured against itself: how far its ratio is from 1 is how
far the others can be trusted. The target is a median of at most 1.02.

memory: of a rank that trains 21 million parameters with AdamW (``strategy_memory.py``), above what it had before the
model was built, between steps and at the peak within them; in copies of the model's float32 weights beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from operator import truediv
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
#: A strategy, and the ranks of a tensor group.
STRATEGIES = {
    "ddp": ("ddp", 1),
    "reproducible": ("reproducible", 1),
    "fsdp": ("fsdp", 1),
    "tensor": ("ddp", 2),
    "zero1": ("zero1", 1),
    "zero2": ("zero2", 1),
    "zero3": ("zero3", 1),
}
DEADLINE = 900.0


def torchrun(program: str, ranks: int, *arguments: object, **environ: str) -> Any:
    """Run one of this folder's programs on ``ranks`` ranks; what rank 0 printed as JSON."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environ}
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        done = subprocess.run(
            [*command, str(HERE / program), *map(str, arguments)],
            cwd=folder,
            env=environ,
            timeout=DEADLINE,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))


def times(names: Sequence[str], preset: str, *, starts: int, quads: int, block: int) -> None:
    print("| 2 ranks | by hand | dltrain | ratio | quartiles | ratio of processor time |\n|---|---|---|---|---|---|")
    rows = [(name, *STRATEGIES[name], False) for name in names]
    for name, strategy, tensor, control in [*rows, ("ddp by hand, twice", "ddp", 1, True)]:
        found: list[list[float]] = []
        for start in range(starts):
            found += torchrun("strategy_steps.py", 2, strategy, preset, tensor, quads, block, start % 2, int(control))
        mine, theirs, mine_busy, theirs_busy = zip(*found, strict=True)
        cells = [f"{1e3 * statistics.median(seconds):.1f} ms" for seconds in (theirs, mine)]
        low, ratio, high = statistics.quantiles(map(truediv, mine, theirs), n=4)
        busy = statistics.median(map(truediv, mine_busy, theirs_busy))
        cells += [f"{ratio:.3f}", f"{low:.3f}–{high:.3f}", f"{busy:.3f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def memory(names: Sequence[str], ranks: Sequence[int]) -> None:
    # Without this threshold, freed tensors would stay with the process, some here and some there.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print("| ranks | strategy | between steps | peak in a step | of ddp's |\n|---|---|---|---|---|")
    for world in ranks:
        base: int | None = None
        for name in names:
            weights, between, peak = torchrun("strategy_memory.py", world, *STRATEGIES[name], **settings)
            base = peak if name == "ddp" else base
            share = f"{peak / base:.0%}" if base else "not measured"
            cells = [f"{size / 2**20:.0f} MiB, {size / weights:.1f} ×" for size in (between, peak)]
            print(f"| {world} | {name} | {cells[0]} | {cells[1]} | {share} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="*", default=["time", "memory"], choices=["time", "memory"], metavar="time|memory"
    )
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--preset", default="mini", help="time: size of the Transformer")
    parser.add_argument("--starts", type=int, default=4, help="time: how often the processes are started anew")
    parser.add_argument("--quads", type=int, default=12, help="time: ratios taken in each start")
    parser.add_argument(
        "--block", type=int, default=5, help="time: steps that one trains before it is the other's turn"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="memory: numbers of ranks")
    args = parser.parse_args()
    if "time" in args.what:
        times(args.strategies, args.preset, starts=args.starts, quads=args.quads, block=args.block)
    if "memory" in args.what:
        memory(args.strategies, args.ranks)


if __name__ == "__main__":
    main()
