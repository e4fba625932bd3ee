"""From the command to the first optimizer step: dltrain (cold and warm), torchrun, Ray Train; and their memory.

    pip install -e '.[benchmarks]'
    python benchmarks/launch.py [--ranks 4 8] [--repeats 5] [--without "Ray Train"] [--json FILE]

All run the same script (Ray Train: the same function) on one machine with gloo. "cold" starts Ray itself; "warm" joins
a cluster that runs already (--address) and holds a fork server from an earlier launch (--keep-warm); the cluster's own
start is not counted there. Memory is the sum of the proportional set sizes (PSS) of every process that the command
started, taken while all ranks stand after their first step; the warm cluster's processes are counted too. Runs are
interleaved. Prints medians, spreads, and ratios to torchrun of the same repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from processes import marked, new_mark, send

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
SCRIPT = str(HERE / "peers/first_step.py")
DEADLINE = 180.0
PORT = 6402


def pss(mark: str) -> float:
    """Sum of the proportional set sizes of the marked processes, in MiB."""
    total = 0
    for entry in marked(mark):
        try:
            lines = (entry / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


@contextmanager
def running(command: list[str], folder: Path, mark: str) -> Iterator[None]:
    """The command, alive while the block runs; afterwards it and its descendants are gone."""
    name, _, value = mark.partition("=")
    environ = {**os.environ, name: value, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield
            process.wait(DEADLINE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def measure(command: Callable[[Path], list[str]], *, cluster: str = "") -> tuple[float, float]:
    """Seconds from the command to the first optimizer step, and MiB of memory at that time.

    ``cluster`` is the mark of a running cluster's processes; they are counted, and stay.
    """
    mark = cluster or new_mark()
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        folder = Path(name)
        begin = time.time()
        try:
            with running(command(folder), folder, mark):
                while not (folder / "first").exists():
                    if time.time() - begin > DEADLINE:
                        raise TimeoutError(f"no first step within {DEADLINE:g} s:\n{(folder / 'log').read_text()}")
                    time.sleep(0.01)
                seconds = float((folder / "first").read_text()) - begin
                memory = pss(mark)
                (folder / "go").touch()
        finally:
            if not cluster:
                send(mark, signal.SIGKILL)
    return seconds, memory


def torchrun(ranks: int) -> Callable[[Path], list[str]]:
    return lambda out: [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), SCRIPT, str(out)]


def ray_train(ranks: int) -> Callable[[Path], list[str]]:
    return lambda out: [sys.executable, str(HERE / "peers/ray_train.py"), "first_step", str(out), str(ranks), "0"]


def dltrain(ranks: int, *options: str) -> Callable[[Path], list[str]]:
    command = [str(BIN / "dltrain"), "launch", "--nproc-per-node", str(ranks), *options]
    return lambda out: [*command, "--run-dir", str(out / "runs"), SCRIPT, str(out)]


@contextmanager
def ray_cluster(cpus: int) -> Iterator[str]:
    """A Ray cluster of one node, as ``ray start --head`` makes it; the mark of its processes."""
    mark = new_mark()
    name, _, value = mark.partition("=")
    environ = {**os.environ, name: value, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="bench-ray") as folder:
        command = [str(BIN / "ray"), "start", "--head", f"--port={PORT}", f"--num-cpus={cpus}", f"--temp-dir={folder}"]
        command += ["--include-dashboard=false", "--object-store-memory=80000000", "--node-ip-address=127.0.0.1"]
        subprocess.run(command, check=True, capture_output=True, env=environ, timeout=DEADLINE)
        try:
            yield mark
        finally:
            while marked(mark):
                send(mark, signal.SIGKILL)
                time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="+", default=[], metavar="CONTENDER")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # the same for every contender
    results: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for ranks in args.ranks:
        table = results.setdefault(f"{ranks} ranks", {})
        with ray_cluster(ranks) as cluster:
            join = ("--address", f"127.0.0.1:{PORT}", "--keep-warm", "10min")
            measure(dltrain(ranks, *join), cluster=cluster)  # warms it
            contenders: dict[str, Callable[[], tuple[float, float]]] = {
                "torchrun": partial(measure, torchrun(ranks)),
                "Ray Train": partial(measure, ray_train(ranks)),
                "dltrain cold": partial(measure, dltrain(ranks)),
                "dltrain cold, 2 nodes": partial(measure, dltrain(ranks // 2, "--nodes", "2")),
                "dltrain warm": partial(measure, dltrain(ranks, *join), cluster=cluster),
            }
            for label in args.without:
                del contenders[label]
            for repeat in range(args.repeats):
                for label, run in contenders.items():
                    table.setdefault(label, []).append(run())
                    seconds, memory = table[label][-1]
                    print(f"{ranks} ranks, repeat {repeat + 1}: {label}: {seconds:.2f} s, {memory:.0f} MiB", flush=True)
    for title, table in results.items():
        report(title, table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


def report(title: str, table: dict[str, list[tuple[float, float]]]) -> None:
    print(f"\n{title:24} {'first step':>12} {'spread':>15} {'ratio':>6} {'memory':>10} {'ratio':>6}")
    base = table["torchrun"]
    for label, values in table.items():
        seconds = [value[0] for value in values]
        memory = statistics.median(value[1] for value in values)
        ratio = statistics.median(value[0] / peer[0] for value, peer in zip(values, base, strict=True))
        share = statistics.median(value[1] / peer[1] for value, peer in zip(values, base, strict=True))
        print(
            f"{label:24} {statistics.median(seconds):10.2f} s {min(seconds):7.2f}–{max(seconds):.2f} s"
            f" {ratio:6.2f} {memory:6.0f} MiB {share:6.2f}"
        )


if __name__ == "__main__":
    main()
