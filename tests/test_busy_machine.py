"""A machine that is busy with something else: ranks and agents get little of it, and nobody is given up for that."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import pytest
from launching import Sandbox
from runs import RunFolder

STEPS = 10_000
JOB = (
    *("model.widths=[4]", "model.hidden=16", f"train.steps={STEPS}", "train.global_batch=8", "train.microbatches=2"),
    *("train.evaluate_every=2000", "checkpoint.every=1000", "tracking.wandb.mode=disabled"),
)


@contextmanager
def spinners() -> Generator[None]:
    """As many processes as this one may use cores, each of which keeps one busy at the usual priority, where it may."""
    with ExitStack() as stack:
        for _ in os.sched_getaffinity(0):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, process.pid, 0)
        yield


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_ten_thousand_steps_on_a_busy_machine_and_nobody_is_given_up(sandbox: Sandbox) -> None:
    with spinners():
        done = sandbox.run("launch", "--nodes", "2", *JOB, "recovery.spares=1", "--max-restarts", "3", timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunFolder(sandbox.folder / "runs/digits/0001")
    assert run.steps() == list(range(1, STEPS + 1))
    assert run.record()["generations"] == 1, done.stdout
    assert not list(run.path.glob("failures/*"))
    assert "lost" not in done.stdout
    told = re.findall(r"rank \d \(node \d\) has made no progress for .* s", done.stdout)
    seconds = [row["train/step_seconds"] for row in run.rows()]
    print(f"{sum(seconds):.0f} s of steps, the longest {max(seconds):.2f} s; told of slow ranks: {told}")
