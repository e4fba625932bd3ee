"""The benchmarks run: each in its smallest form, whose figures mean nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # minutes, where the machine is busy

FOLDER = Path(__file__).parent.parent / "benchmarks"


def run(program: str, *arguments: str, timeout: float = 800) -> str:
    """What a benchmark printed. One that is late, and all that it has started, is told to end."""
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        printed = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        raise AssertionError(process.communicate(timeout=60)[0]) from None
    assert process.returncode == 0, printed
    return printed


def rows(printed: str) -> list[list[str]]:
    """The cells of a Markdown table's rows."""
    return [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]


def test_the_order_is_measured() -> None:
    assert "12 positions" in run("order.py", "--samples", "100000", "--positions", "10")


@pytest.mark.slow
def test_steps_are_measured_beside_the_same_by_hand() -> None:
    strategies = ("ddp", "fsdp", "tensor", "zero3")
    shortest = ("--starts", "1", "--quads", "2", "--block", "1")
    found = rows(run("strategies.py", "time", *shortest, "--strategies", *strategies))
    assert [cells[0] for cells in found] == [*strategies, "ddp by hand, twice"]
    assert all(float(cells[3]) > 0 for cells in found)


@pytest.mark.slow
def test_memory_is_measured() -> None:
    found = rows(run("strategies.py", "memory", "--strategies", "ddp", "fsdp", "tensor", "--ranks", "2"))
    assert [cells[1] for cells in found] == ["ddp", "fsdp", "tensor"]
    assert all(float(cells[4].rstrip("%")) < 80 for cells in found[1:])


@pytest.mark.slow
def test_steps_of_whole_launches_are_measured() -> None:
    printed = run("step.py", "--repeats", "1", "--rounds", "2", "--slot", "2", "--warm", "20", "--wandb", "hanging")
    assert "dltrain, W&B hanging" in printed.rpartition("quartiles")[2]


@pytest.mark.slow
def test_launches_are_measured() -> None:
    without = ("Ray Train", "dltrain cold, 2 nodes")  # the first is an extra of the benchmarks
    printed = run("launch.py", "--ranks", "2", "--repeats", "1", "--without", *without)
    assert "dltrain warm" in printed.rpartition("spread")[2]


@pytest.mark.campaign
def test_recoveries_are_measured() -> None:
    without = ("Ray Train", "torchrun, plain store", "dltrain, every step")
    found = rows(run("recovery.py", "--ranks", "2", "--repeats", "1", "--without", *without))
    assert [cells[0] for cells in found] == ["dltrain", "torchrun"]
    assert [cells[5] for cells in found] == ["1 of 1", "1 of 1"]


@pytest.mark.slow
def test_checkpoints_are_measured_beside_others() -> None:
    printed = run("checkpoint.py", "--ranks", "2", "--parameters", "0.1", "--state", "rows", "--repeats", "1")
    found = rows(printed)
    assert [cells[0] for cells in found] == ["dltrain", "dcp.save", "dcp.async_save", "torch.save", "deepspeed"]
    assert [cells[-1] for cells in found].count("refused") == 1
    assert printed.count("; target ") == 4
