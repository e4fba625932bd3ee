"""Memory that runs out: who is asked for what, told with what there was, and never tried a third time."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from dltrain.core.config import load_job
from dltrain.core.memory import RecentKills, Room, asked, in_words, kills, remedies
from dltrain.launcher.failure import casualty_of
from dltrain.launcher.messages import Exit
from dltrain.training.scarcity import out_of_memory
from launching import Sandbox
from stage import JOB, LAUNCH, gate, put_recipe, run_of, wait_at_gate

HOST = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
)
GPU = "CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity of 139 GiB."
NUMPY = "Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64"


@pytest.mark.parametrize(
    ("text", "size"),
    [(f"{HOST}8000000 bytes. Error code 12", 8_000_000), (GPU, 20.5 * 2**20), (NUMPY, 7.45 * 2**30), ("", None)],
)
def test_what_was_asked_for_is_read_from_the_allocators_words(text: str, size: float | None) -> None:
    assert asked(text) == (None if size is None else round(size))


def test_sizes_in_words() -> None:
    assert [in_words(size) for size in (0, 512, 2048, 3.4 * 2**30)] == ["0 bytes", "512 bytes", "2.0 KiB", "3.4 GiB"]


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize(
    ("error", "known"),
    [
        (MemoryError(), True),
        (RuntimeError(f"{HOST}8 bytes."), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_an_exception_is_known_and_told_alike_every_time(error: BaseException, known: bool) -> None:
    job = load_job(None, ("train.microbatches=8",), {}, {}).job
    told = out_of_memory(error, job, torch.device("cpu"))
    assert (told is not None) == known
    if told is not None:
        assert told == out_of_memory(error, job, torch.device("cpu")) or told.hints[0].startswith("there was: ")
        assert any("train.microbatches (now 8)" in hint for hint in told.hints)


@pytest.mark.usefixtures("empty_folder")
def test_only_what_is_not_done_yet_is_said_to_help() -> None:
    done = ("parallel.strategy=fsdp", "train.recompute=true", "train.precision=bf16", "data.prefetch=0")
    found = remedies(load_job(None, done, {}, {}).job)
    assert [line for line in found if any(key in line for key in ("strategy", "recompute", "precision", "data."))] == []


def test_control_groups_bound_the_room_and_count_their_kills(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  2048 kB\nMemAvailable:  1024 kB\n")
    (proc / "self/status").write_text("Name: x\nVmRSS:\t 100 kB\n")
    (proc / "vmstat").write_text("nr_free 1\noom_kill 7\n")
    assert Room.now(proc, groups) == Room(2048 * 1024, 1024 * 1024, 100 * 1024)
    inner = groups / "job/rank"
    inner.mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/job/rank\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("5000\n")
    (inner / "memory.events.local").write_text("oom 4\noom_kill 2\n")
    (inner.parent / "memory.max").write_text("9000\n")
    (inner.parent / "memory.current").write_text("6000\n")
    (inner.parent / "memory.events").write_text("oom_kill 30\n")  # of all containers in it
    (inner.parent / "memory.events.local").write_text("oom_kill 0\n")
    assert Room.now(proc, groups) == Room(9000, 3000, 100 * 1024)
    assert kills(proc, groups) == (2, 7)
    old = groups / "memory/job"
    old.mkdir(parents=True)
    (proc / "self/cgroup").write_text("4:memory:/job\n0::/\n")
    (old / "memory.limit_in_bytes").write_text("8000\n")
    (old / "memory.usage_in_bytes").write_text("1000\n")
    (old / "memory.oom_control").write_text("oom_kill_disable 0\noom_kill 5\n")
    assert Room.now(proc, groups) == Room(8000, 7000, 100 * 1024)
    assert kills(proc, groups) == (5, 7)


def test_only_what_the_kernel_killed_just_now_counts() -> None:
    began = counted = (4, 9)
    recent = RecentKills(lambda: counted)
    found: list[tuple[int, int]] = []
    for second in range(30):
        counted = (5, 11) if second >= 10 else began
        recent.look(float(second))
        found.append(recent.since(began))
    assert found == [(0, 0)] * 10 + [(1, 2)] * 5 + [(0, 0)] * 15
    counted = (5, 12)
    assert recent.since(began) == (0, 1)
    assert recent.since((5, 12)) == (0, 0)  # it began after that
    assert RecentKills(lambda: (5, 9)).since(began) == (1, 0)  # nobody has looked before


@pytest.mark.parametrize(
    ("found", "says", "starved"),
    [
        ((0, 0), "not by the kernel", False),
        ((0, 1), "probably killed by the kernel", True),
        ((2, 2), "group ran", True),
    ],
)
def test_a_sigkill_is_told_by_what_the_kernel_counts(
    tmp_path: Path, found: tuple[int, int], says: str, starved: bool
) -> None:
    exit_ = Exit(None, signal.SIGKILL, 1.0, max_rss=3 << 30)
    traces = {"error_file": None, "step": 4, "phase": "forward", "oom_kills": found}
    casualty = casualty_of(1, 0, exit_, None, traces, tmp_path, speaks=True, remedies=["less"])
    assert says in casualty.failure.what
    assert casualty.failure.starved == starved
    assert list(casualty.hints) == (["it held at most: 3.0 GiB", "would help: less"] if starved else [])


def test_a_rank_that_asks_for_too_much_twice_is_not_tried_again_and_says_what_would_help(sandbox: Sandbox) -> None:
    put_recipe(sandbox)
    closed = gate(sandbox)
    job = (*JOB, "model.allocate_at=20", "model.rank=1")
    with sandbox.start(*LAUNCH, *job, "--max-restarts", "5") as process:
        wait_at_gate(sandbox, process)
        ranks = [Path(f"/proc/{pid}/oom_score_adj") for rank in (0, 1) for pid in sandbox.named(f"dltrain-rank{rank}")]
        assert "1000" in {path.read_text().strip() for path in ranks}
        closed.unlink()
        _, err = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "rank 1 on node 1 failed with RuntimeError; the same as before, so another try would end alike" in err
    reports = sorted((run_of(sandbox).path / "failures").glob("*.txt"))
    assert len(reports) == 2
    text = reports[0].read_text()
    assert text.startswith("A failure: rank 1 on node 1 failed with RuntimeError.")
    assert "error: RuntimeError: out of memory: it asked for 4096.0 TiB" in text
    assert "there was: " in text
    assert "would help: parallel.strategy=fsdp" in text
    assert json.loads(reports[0].with_suffix(".json").read_text())["ranks"][0]["starved"] is True
