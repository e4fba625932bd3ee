"""From the SIGKILL of a rank to the first new step, and goodput under kills: dltrain, torchrun, Ray Train.

    pip install -e '.[benchmarks]'
    python benchmarks/recovery.py [--ranks 4 8] [--repeats 5] [--without torchrun] [--json FILE]
    python benchmarks/recovery.py --goodput [--ranks 4] [--minutes 5] [--every 30]

All train the same small model at the same pace (20 ms of sleep a step) on one machine with gloo, and write a checkpoint
every 20 steps. dltrain runs with `recovery.max_restarts`, and takes snapshots in memory as often as it thinks fit
(`recovery.snapshot: auto`) or, "every step", in each; torchrun with `--max-restarts` and a monitor that looks ten times
a second; Ray Train with `FailureConfig` and health checks four times a second. torchrun does not survive a restart with
gloo unless the script keeps the elastic agent's store free of the keys of earlier starts: "torchrun" is a script that
does, "torchrun, plain store" one that does not, which is tried once.

A rank is killed from outside at a step that differs from repeat to repeat, the same for all. Counted are the seconds
until rank 0 begins a step that it had not begun before, and how many steps it did twice. Goodput is the share of a
stretch of time that went into steps which were done for the first time. Runs are interleaved.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import new_mark, send

PEERS = Path(__file__).parent / "peers"
BIN = Path(sys.executable).parent
DEADLINE, BACK = 120.0, 60.0  # seconds to come to a step; to come back
PLAIN = "torchrun, plain store"
EVERY = 20
SAMPLES = 32
SEED = 1

Command = Callable[[Path, int], list[str]]


def dltrain(out: Path, ranks: int) -> list[str]:
    shutil.copy(PEERS / "recovery_recipe.py", out)
    job = {
        "recipe": "recovery_recipe:Paced",
        "model.out": str(out),
        "name": "recovery",
        "data.source": "recovery_recipe:samples",
        "data.normalize": "false",
        "train.steps": 1_000_000,
        "train.global_batch": SAMPLES * ranks,
        "train.microbatches": ranks,
        "train.evaluate_every": 1_000_000,
        "checkpoint.every": EVERY,
        "recovery.max_restarts": 1000,
        "resources.cpus_per_rank": 1,
        "tracking.wandb.mode": "disabled",
    }
    options = ["--nproc-per-node", str(ranks), "--run-dir", str(out / "runs"), "--quiet"]
    return [str(BIN / "dltrain"), "launch", *(f"{key}={value}" for key, value in job.items()), *options]


def dltrain_every_step(out: Path, ranks: int) -> list[str]:
    return [*dltrain(out, ranks), "recovery.snapshot=1"]


def torchrun(out: Path, ranks: int) -> list[str]:
    return [*torchrun_plain(out, ranks), "--prefix"]


def torchrun_plain(out: Path, ranks: int) -> list[str]:
    options = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "1000", "--monitor-interval", "0.1"]
    return [str(BIN / "torchrun"), *options, str(PEERS / "recovery_loop.py"), str(out)]


def ray_train(out: Path, ranks: int) -> list[str]:
    return [sys.executable, str(PEERS / "ray_train.py"), "recovery_loop", str(out), str(ranks), "-1"]


CONTENDERS: dict[str, Command] = {
    "dltrain": dltrain,
    "dltrain, every step": dltrain_every_step,
    "torchrun": torchrun,
    PLAIN: torchrun_plain,
    "Ray Train": ray_train,
}


@dataclass
class Run:
    """A run under way, and the steps that its rank 0 has begun, each with its Unix time."""

    out: Path
    process: subprocess.Popen[bytes]

    def stamps(self) -> list[tuple[int, float]]:
        path = self.out / "stamps"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line.split() for line in lines if line.endswith("\n")]
        return [(int(step), float(at)) for step, at in whole]

    def furthest(self) -> int:
        return max((step for step, _ in self.stamps()), default=-1)

    def reach(self, step: int, seconds: float = DEADLINE) -> bool:
        """Whether it comes to the step in time."""
        deadline = time.monotonic() + seconds
        while self.furthest() < step:
            if time.monotonic() > deadline or self.process.poll() is not None:
                return False
            time.sleep(0.005)
        return True

    def kill(self, rank: int) -> float:
        """SIGKILL to the rank; the Unix time of it."""
        os.kill(int((self.out / f"pid-{rank}").read_text()), signal.SIGKILL)
        return time.time()


@contextmanager
def running(command: Command, ranks: int) -> Iterator[Run]:
    """The contender's run, alive while the block runs; afterwards it and its descendants are gone."""
    mark = new_mark()
    name, _, value = mark.partition("=")
    out = Path(tempfile.mkdtemp(prefix="bench", dir="/tmp"))
    environ = {
        **os.environ,
        name: value,
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(out),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    }
    try:
        with (out / "log").open("wb") as log:
            process = subprocess.Popen(
                command(out, ranks),
                cwd=out,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        run = Run(out, process)
        if not run.reach(1):
            raise TimeoutError(f"no first step within {DEADLINE:g} s:\n{(out / 'log').read_text()[-4000:]}")
        yield run
    finally:
        for _ in range(20):  # some are started anew by others that end later
            send(mark, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(out, ignore_errors=True)


@dataclass(frozen=True)
class Recovery:
    """Seconds from the kill to a new step, and steps done twice; no seconds where it did not come back."""

    seconds: float | None
    again: int


def recover(command: Command, ranks: int, at: int) -> Recovery:
    """Kill the last rank once step ``at`` has begun."""
    with running(command, ranks) as run:
        if not run.reach(at):
            raise TimeoutError(f"it did not come to step {at}:\n{(run.out / 'log').read_text()[-4000:]}")
        killed = run.kill(ranks - 1)
        time.sleep(0.05)  # what the others had begun before they heard of it
        before = run.stamps()
        reached = max(step for step, _ in before)
        if not run.reach(reached + 1, BACK):
            return Recovery(None, 0)
        stamps = run.stamps()
        new = next(when for step, when in stamps if step > reached and when > killed)
        done = [step for step, _ in stamps if step < reached]
        return Recovery(new - killed, len(done) - len(set(done)))


@dataclass(frozen=True)
class Goodput:
    """Share of the time that went into new steps, and how many kills there were and steps begun twice."""

    ratio: float
    kills: int
    again: int


def goodput(command: Command, ranks: int, *, minutes: float, every: float) -> Goodput:
    """Kill a random rank ``every`` so many seconds, for ``minutes``, from step 60 on."""
    draw = random.Random(SEED)
    with running(command, ranks) as run:
        run.reach(60)
        begin = time.time()
        kills: list[float] = []
        while (left := begin + 60 * minutes - time.time()) > 0 and run.process.poll() is None:
            time.sleep(min(every, left))
            if left > every:
                with contextlib.suppress(ProcessLookupError):  # it is not there again yet
                    kills.append(run.kill(draw.randrange(ranks)))
        end = time.time()
        stamps = [(step, at) for step, at in run.stamps() if begin < at <= end]
        seconds, again = productive(stamps, kills)
        return Goodput(seconds / (end - begin), len(kills), again)


def productive(stamps: list[tuple[int, float]], kills: list[float]) -> tuple[float, int]:
    """Seconds of the steps that were done for the first time, from one's begin to the next's; how many were done again.

    A step in which a rank was killed counts as neither.
    """
    seconds, again, furthest = 0.0, 0, -1
    for (step, begun), (following, ended) in itertools.pairwise(stamps):
        if following == step + 1 and not any(begun <= at <= ended for at in kills):
            seconds += (ended - begun) * (step > furthest)
            again += step <= furthest
            furthest = max(furthest, step)
    return seconds, again


def compare_recovery(ranks: int, repeats: int, contenders: dict[str, Command]) -> dict[str, list[Recovery]]:
    found: dict[str, list[Recovery]] = {label: [] for label in contenders}
    draw = random.Random(SEED)
    for repeat in range(repeats):
        at = 60 + draw.randrange(EVERY)
        for label, command in contenders.items():
            if label == PLAIN and repeat:
                continue
            result = recover(command, ranks, at)
            found[label].append(result)
            came = "did not come back" if result.seconds is None else f"{result.seconds:.2f} s"
            print(f"{ranks} ranks, repeat {repeat + 1}: {label}: {came}, {result.again} steps again", flush=True)
    return found


def report_recovery(ranks: int, found: dict[str, list[Recovery]]) -> None:
    print(f"\n{ranks} ranks, killed → first new step\n")
    print("| | median | spread | to dltrain | steps again | came back |\n|---|---|---|---|---|---|")
    ours = found.get("dltrain", [])
    for label, results in found.items():
        seconds = [result.seconds for result in results if result.seconds is not None]
        came = f"{len(seconds)} of {len(results)}"
        if not seconds:
            print(f"| {label} | – | – | – | – | {came} |")
            continue
        pairs = [(r.seconds, o.seconds) for r, o in zip(results, ours, strict=False) if r.seconds and o.seconds]
        ratio = f"{statistics.median(theirs / own for theirs, own in pairs):.1f} ×" if pairs else "–"
        again = ", ".join(str(result.again) for result in results if result.seconds is not None)
        spread = f"{min(seconds):.2f}–{max(seconds):.2f} s"
        print(f"| {label} | {statistics.median(seconds):.2f} s | {spread} | {ratio} | {again} | {came} |")


def report_goodput(ranks: int, found: dict[str, Goodput]) -> None:
    print(f"\n{ranks} ranks, goodput under kills\n")
    print("| | goodput | kills | steps again |\n|---|---|---|---|")
    for label, result in found.items():
        print(f"| {label} | {result.ratio:.1%} | {result.kills} | {result.again} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--goodput", action="store_true", help="measure goodput under kills instead")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two kills")
    parser.add_argument("--without", nargs="+", default=[], choices=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # the same for every contender
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with it
    contenders = {label: command for label, command in CONTENDERS.items() if label not in args.without}
    results: dict[str, object] = {}
    for ranks in args.ranks:
        if args.goodput:
            contenders.pop(PLAIN, None)  # it ends with the first kill
            rates = {
                label: goodput(command, ranks, minutes=args.minutes, every=args.every)
                for label, command in contenders.items()
            }
            report_goodput(ranks, rates)
            results[f"{ranks} ranks"] = {label: vars(rate) for label, rate in rates.items()}
        else:
            found = compare_recovery(ranks, args.repeats, contenders)
            report_recovery(ranks, found)
            results[f"{ranks} ranks"] = {label: [vars(one) for one in each] for label, each in found.items()}
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
