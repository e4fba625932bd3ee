"""Launches of the staged job (``staged.py``): a run can be held at a step while something happens to it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from launching import Sandbox, wait_for
from runs import RunFolder

STEPS = 60
WAIT_AT = 20
JOB = (
    *("recipe=staged:Staged", "model.widths=[4]", "model.hidden=16", f"train.steps={STEPS}", "train.microbatches=4"),
    *("train.evaluate_every=7", "train.clip_norm=1.0", "checkpoint.every=10", "tracking.wandb.mode=disabled"),
)
LAUNCH = ("launch", "--nodes", "2")


def put_recipe(box: Sandbox) -> None:
    shutil.copy(Path(__file__).with_name("staged.py"), box.folder)


def uninterrupted(folder: Path, *job: str) -> RunFolder:
    """A run of JOB, and more of a job, on two ranks that nothing happens to."""
    box = Sandbox(folder)
    try:
        put_recipe(box)
        done = box.run(*LAUNCH, *JOB, *job)
        assert done.returncode == 0, done.stderr
        return run_of(box)
    finally:
        box.close()


def gate(box: Sandbox, step: int = WAIT_AT) -> Path:
    """Close the gate before ``step``; unlink it to open it."""
    for stale in box.folder.glob("waiting-*"):
        stale.unlink()
    path = box.folder / f"wait-at-{step}"
    path.touch()
    return path


def wait_at_gate(box: Sandbox, process: subprocess.Popen[str], ranks: int = 2) -> None:
    waiting = [box.folder / f"waiting-{rank}" for rank in range(ranks)]

    def there() -> bool:
        assert process.poll() is None, process.communicate()
        return all(path.exists() for path in waiting)

    wait_for(there, what="ranks at the gate")


def ctrl_c(process: subprocess.Popen[str]) -> None:
    """What the terminal does: SIGINT to the whole foreground process group."""
    os.killpg(process.pid, signal.SIGINT)


def stop_at(
    box: Sandbox, step: int, *command: str, ranks: int = 2, signum: signal.Signals = signal.SIGINT, **environ: str
) -> tuple[str, str]:
    """Run ``command`` to ``step``, and send ``signum`` to its process group there; its standard output and error.

    Ranks go on when they have been told, so the run stops within the next few steps.
    """
    (box.folder / "until-told").touch()
    closed = gate(box, step)
    with box.start(*command, **environ) as process:
        wait_at_gate(box, process, ranks)
        os.killpg(process.pid, signum)
        closed.unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, err
    return out, err


def run_of(box: Sandbox) -> RunFolder:
    """The one run of the sandbox."""
    numbers = [path.name for path in (box.folder / "runs/digits").iterdir() if path.name.isdecimal()]
    assert numbers == ["0001"]
    return RunFolder(box.folder / "runs/digits/0001")


def assert_same_run(run: RunFolder, reference: RunFolder) -> None:
    """Complete, every step once, and equal to ``reference`` to the bit."""
    assert run.record()["state"] == "finished"
    assert run.steps() == list(range(1, STEPS + 1))
    assert run.numbers() == reference.numbers()
    assert run.weights() == reference.weights()
