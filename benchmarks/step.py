"""Step time of ``dltrain launch`` against a hand-written DDP loop under torchrun: same model, data and batch.

    python benchmarks/step.py [--repeats 5] [--rounds 4] [--slot 4] [--wandb disabled alive ...] [--json FILE]

Everything that dltrain reports is on: metrics of every step, journal, progress, W&B in each of the modes named below.
All contenders are started together; once they are warm, all but one are stopped (SIGSTOP, with everything they have
started), and each in turn runs alone for a slot of some seconds. A round gives each one slot. So what else the machine
does over the minutes hits all alike, and neighbours in time are compared: a ratio is taken to the mean of the
hand-written loop's slots before and after. A repeat starts all of them anew, since a process keeps what luck it has
with its memory's layout (one or two per cent). Prints medians and quartiles; the target is a median ratio of at most
1.02.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from processes import marked, new_mark, send

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
PEER = "hand-written DDP, torchrun"
SETTLE = 0.5  # seconds of a slot that do not count
DEADLINE = 300.0
MODES = ("disabled", "offline", "alive", "dead", "hanging")


@dataclass
class Contender:
    """A training in a process tree of its own, and the file that says when each step ended."""

    label: str
    mark: str
    folder: Path

    def times(self) -> np.ndarray:
        """Unix time of each step's end so far, in seconds."""
        if self.label == PEER:
            path = self.folder / "times"
            times = np.fromfile(path) if path.exists() else np.zeros(0)
            return times[times > 0]
        path = self.folder / "digits/latest/metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return np.array([json.loads(line)["time"] for line in lines])

    def slot(self, seconds: float) -> tuple[float, float]:
        """Run alone for some seconds; when that was."""
        send(self.mark, signal.SIGCONT)
        begin = time.time()
        time.sleep(seconds)
        end = time.time()
        send(self.mark, signal.SIGSTOP)
        return begin + SETTLE, end


def step_seconds(times: np.ndarray, begin: float, end: float) -> float:
    """Mean time of the steps in a slot."""
    inside = times[(times > begin) & (times < end)]
    return float((inside[-1] - inside[0]) / (len(inside) - 1))


@contextmanager
def contender(label: str, folder: Path, command: list[str], **environ: str) -> Iterator[Contender]:
    folder.mkdir()
    mark = new_mark()
    name, _, value = mark.partition("=")
    settings = {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}
    try:
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **settings, **environ, name: value}, stdout=log, stderr=log
            )
        yield Contender(label, mark, folder)
        assert process.poll() is None, (folder / "log").read_text()
    finally:
        send(mark, signal.SIGCONT)
        for _ in range(2):  # twice means at once
            process.terminate()
            time.sleep(1.0)
        try:
            process.wait(30)
        finally:
            while marked(mark):
                send(mark, signal.SIGKILL)
                time.sleep(0.1)


class SlowServer:
    """Takes connections and never answers, as a W&B server that hangs does."""

    def __enter__(self) -> str:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                self._open.append(self._socket.accept()[0])
            except OSError:
                return

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        for connection in self._open:
            connection.close()


def start_all(stack: ExitStack, batch: int, widths: list[int], warm: int, modes: list[str]) -> list[Contender]:
    """Start the contenders in folders of their own and wait until all are warm."""
    from wandb_server import StandIn

    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench")))
    peer = [
        *(str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", str(HERE / "peers/ddp_loop.py")),
        *("--batch", str(batch), "--out", "times", "--widths", *map(str, widths)),
    ]
    ours = [
        *(str(BIN / "dltrain"), "launch", "--nproc-per-node", "2", "--run-dir", "."),
        *("train.steps=4000000", f"train.global_batch={batch}", f"model.widths={widths}"),
        *("data.split.train=1", "data.split.val=0", "data.split.test=0", "train.schedule.name=constant"),
    ]
    urls = {
        "disabled": "",
        "offline": "",
        "alive": stack.enter_context(StandIn()).url,
        "dead": "http://127.0.0.1:9",
        "hanging": stack.enter_context(SlowServer()),
    }
    contenders = [stack.enter_context(contender(PEER, root / "peer", peer))]
    for name in modes:
        url = urls[name]
        mode = f"tracking.wandb.mode={'online' if url else name}"
        start = contender(f"dltrain, W&B {name}", root / name, [*ours, mode], WANDB_BASE_URL=url)
        contenders.append(stack.enter_context(start))
    for thread in Path("/proc/self/task").iterdir():  # the servers stand for other machines
        os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
    deadline = time.monotonic() + DEADLINE
    while waiting := [each.label for each in contenders if len(each.times()) < warm]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not warm within {DEADLINE:g} s: {', '.join(waiting)}")
        time.sleep(0.5)
    return contenders


def measure(
    rounds: int, slot: float, batch: int, widths: list[int], warm: int, modes: list[str]
) -> dict[str, list[tuple[float, float]]]:
    """Start everything anew; of each slot the mean step time, and its ratio to the hand-written loop's around it."""
    with ExitStack() as stack:
        contenders = start_all(stack, batch, widths, warm, modes)
        for each in contenders:
            send(each.mark, signal.SIGSTOP)
        slots: dict[str, list[tuple[float, float]]] = {each.label: [] for each in contenders}
        for _ in range(rounds):
            for each in contenders:
                slots[each.label].append(each.slot(slot))
        slots[PEER].append(contenders[0].slot(slot))
        for each in contenders[1:]:
            each.slot(2.0)  # its last rows reach the disk
        steps = {
            each.label: [step_seconds(each.times(), begin, end) for begin, end in slots[each.label]]
            for each in contenders
        }
    around = [(before + after) / 2 for before, after in pairwise(steps[PEER])]
    return {
        label: [(value, value / base) for value, base in zip(values, around, strict=label != PEER)]
        for label, values in steps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--slot", type=float, default=4.0, help="seconds")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--wandb", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--warm", type=int, default=1500, help="steps, over which W&B has started too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopped contenders end too
    sys.path.insert(0, str(HERE.parent / "tests"))
    results: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(args.repeats):
        for label, values in measure(args.rounds, args.slot, args.batch, args.widths, args.warm, args.wandb).items():
            results.setdefault(label, []).extend(values)
            seconds, ratio = (statistics.median(column) for column in zip(*values, strict=True))
            print(f"repeat {repeat + 1}: {label}: {seconds * 1e3:.3f} ms, ratio {ratio:.3f}", flush=True)
    report(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


def report(results: dict[str, list[tuple[float, float]]]) -> None:
    print(f"\n{'':30} {'median':>10} {'quartiles':>18} {'ratio':>7} {'quartiles':>13}")
    for label, values in results.items():
        times, ratios = zip(*values, strict=True)
        low, middle, high = (value * 1e3 for value in statistics.quantiles(times))
        ratio_low, ratio, ratio_high = statistics.quantiles(ratios)
        print(f"{label:30} {middle:7.3f} ms {low:8.3f}–{high:.3f} ms {ratio:7.3f} {ratio_low:6.3f}–{ratio_high:.3f}")


if __name__ == "__main__":
    main()
