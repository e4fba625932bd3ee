"""Time to reach any position of a 10⁹-sample data set, as a resumed rank does: plan, order, first step's samples.

python benchmarks/order.py [--samples 1000000000] [--limit-ms 50]

Exits with 1 when the slowest position takes longer than the limit.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
import tracemalloc

from dltrain.data.order import StepPlan


def reach(samples: int, step: int, *, rank: int, ranks: int) -> float:
    """Seconds from nothing to the samples of ``rank`` in ``step``."""
    start = time.perf_counter()
    plan = StepPlan(samples, seed=7, global_batch=1024, microbatches=ranks, epochs=3)
    microbatches = next(iter(plan.deal(rank=rank, data_ranks=ranks, start_step=step)))
    assert sum(len(piece.indices) for piece in microbatches)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--positions", type=int, default=500)
    parser.add_argument("--limit-ms", type=float, default=50.0)
    args = parser.parse_args()

    steps = StepPlan(args.samples, seed=7, global_batch=1024, microbatches=1, epochs=3).total_steps
    chance = random.Random(0)
    cases = [(0, 0, 1), (steps - 1, 0, 1)]
    for _ in range(args.positions):
        ranks = chance.choice([1, 2, 8, 64])
        cases.append((chance.randrange(steps), chance.randrange(ranks), ranks))
    times = [1e3 * reach(args.samples, step, rank=rank, ranks=ranks) for step, rank, ranks in cases]

    tracemalloc.start()
    reach(args.samples, steps // 2, rank=0, ranks=8)
    peak = tracemalloc.get_traced_memory()[1]

    print(f"{args.samples:,} samples, {steps:,} steps, {len(cases)} positions, 1 to 64 ranks")
    print(f"first (cold) {times[0]:.2f} ms, median {statistics.median(times):.2f} ms, slowest {max(times):.2f} ms")
    print(f"memory {peak / 1024:.0f} KiB, limit {args.limit_ms:g} ms")
    return int(max(times) > args.limit_ms)


if __name__ == "__main__":
    sys.exit(main())
