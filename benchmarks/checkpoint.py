"""What a checkpoint costs, against torch's own ways to write one, and DeepSpeed's.

    python benchmarks/checkpoint.py [--ranks 2 4] [--parameters 50 200] [--state replicas rows] [--repeats 5]

The state is that of AdamW (weights and two moments in float32, 12 bytes a parameter): whole on every rank, as under
DDP, or cut by rows, as under FSDP. The storage is a local folder. In every repeat each way (``checkpoint_ways.py``)
saves once, one after the other and in turn another one first, in the same processes, and reads back what it wrote. The
first repeat is not counted: memory is touched for the first time in it.

stall: how long the call keeps a rank from its next step, of the slowest rank. durable: from the call until everything
is written and synced. bytes: written per byte of state. load: every rank reads what it holds, into the memory where it
is used; load by half: the same by half as many ranks. What was written lies in the page cache then, for all alike.

Ratios are of one repeat, and their median is compared with the target. What does not fit the machine's memory is left
out, and said.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

WAYS = ("dltrain", "dcp.save", "dcp.async_save", "torch.save", "deepspeed")
COLUMNS = ("stall", "durable", "bytes", "load", "load by half")
DEADLINE = 1800.0

Repeat = dict[str, dict[str, float]]


class Target(NamedTuple):
    """A figure of dltrain's may be at most ``limit`` times one of another way's."""

    ours: str
    way: str
    theirs: str
    limit: float


TARGETS = (
    Target("stall", "dcp.async_save", "stall", 0.25),
    Target("durable", "dcp.save", "durable", 1.0),
    Target("load", "dcp.save", "load", 1.0),
    Target("load by half", "dcp.save", "load", 1.0),
)


def run(state: str, millions: float, ranks: int, repeats: int, folder: Path, ways: list[str]) -> list[Repeat]:
    """The figures of each repeat."""
    what = {"state": state, "parameters": round(millions * 1e6), "repeats": repeats, "ways": ways}
    program = [str(Path(__file__).absolute().with_name("checkpoint_ways.py")), json.dumps(what)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory(prefix="bench", dir=folder) as own:
        done = subprocess.run(
            [*command, *program],
            cwd=own,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
            timeout=DEADLINE,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def ways_that_fit(state: str, millions: float, ranks: int, ways: list[str]) -> list[str]:
    """``ways`` without DeepSpeed, or none at all, where the machine's memory is too small for them."""
    whole = 12e6 * millions
    held = whole * (ranks if state == "replicas" else 1)
    # The state, its copies by dltrain (two) and by async_save, the state of half as many ranks, files in memory.
    need = held + 2 * whole + held + held / (2 if state == "replicas" else 1) + whole + 3e8 * ranks
    zero = 1e6 * millions * (12 * ranks + 8)  # weights and gradients on all ranks while it is set up
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    if need > free:
        print(f"left out: {need / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free")
        return []
    if need + zero > free and "deepspeed" in ways:
        print(f"left out: DeepSpeed, with which {(need + zero) / 1e9:.0f} of {free / 1e9:.0f} GB would be needed")
        return [way for way in ways if way != "deepspeed"]
    return ways


def table(repeats: list[Repeat]) -> str:
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for way in [way for way in WAYS if way in repeats[0]]:
        cells = [
            _cell(column, [repeat[way][column] for repeat in repeats if column in repeat[way]]) for column in COLUMNS
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(repeats: list[Repeat], target: Target) -> str:
    """How dltrain's figure compares with the target."""
    ours, way, theirs, limit = target
    ratios = [repeat["dltrain"][ours] / repeat[way][theirs] for repeat in repeats]
    median = statistics.median(ratios)
    met = "met" if median <= limit else "missed"
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"{ours}: {median:.2f} × {way}'s {theirs} ({spread}); target {limit:g}: {met}"


def _cell(column: str, values: list[float]) -> str:
    if not values:
        return "refused"
    if column == "bytes":
        return f"{statistics.median(values):.3f}"
    return f"{statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="even numbers")
    parser.add_argument("--parameters", type=float, nargs="+", default=[50, 200], help="in millions")
    parser.add_argument("--state", nargs="+", choices=("replicas", "rows"), default=["replicas", "rows"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="+", choices=WAYS[3:], default=[])
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the default is the temporary one")
    args = parser.parse_args()
    wanted: list[str] = [way for way in WAYS if way not in args.without]
    cells: list[Any] = [(s, m, r) for s in args.state for m in args.parameters for r in args.ranks]
    for state, millions, ranks in cells:
        print(f"\n{millions:g}M parameters, {ranks} ranks, {state}\n", flush=True)
        ways = ways_that_fit(state, millions, ranks, wanted)
        if ways:
            repeats = run(state, millions, ranks, args.repeats, args.folder or Path(tempfile.gettempdir()), ways)
            print(table(repeats) + "\n")
            print("\n".join(verdict(repeats, target) for target in TARGETS), flush=True)


if __name__ == "__main__":
    main()
