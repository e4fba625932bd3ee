"""A rank or a node that is told to end: all save a checkpoint first, and it is no failure."""

from __future__ import annotations

import os
import signal

from launching import Sandbox, wait_for
from runs import RunFolder
from stage import JOB, LAUNCH, assert_same_run, gate, put_recipe, run_of, wait_at_gate


def test_a_rank_that_is_told_to_end_saves_and_the_run_goes_on_without_a_step_done_again(
    sandbox: Sandbox, reference: RunFolder
) -> None:
    put_recipe(sandbox)
    closed = gate(sandbox)
    with sandbox.start(*LAUNCH, *JOB, "--max-restarts", "1") as process:
        wait_at_gate(sandbox, process)
        told = [pid for name in ("rank1", "save0", "save1") for pid in sandbox.named(f"dltrain-{name}")]
        assert len(told) == 3, sandbox.processes()
        for pid in told:
            os.kill(pid, signal.SIGTERM)
        wait_for((sandbox.folder / "signalled-1").exists, what="the signal to be heard")
        closed.unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "rank 1 was sent SIGTERM: all ranks save a checkpoint and end" in out
    assert "starting all ranks again" in out
    assert "(1 of 1)" not in out  # it is no failure, and takes none of the restarts
    run = run_of(sandbox)
    assert_same_run(run, reference)
    text = (run.path / "failures/0000.txt").read_text()
    assert text.startswith("Preempted: rank 1 was sent SIGTERM.")
    assert ": 0 steps done again" in text


def test_a_node_that_is_told_to_end_stops_a_run_without_restarts_which_can_be_continued(sandbox: Sandbox) -> None:
    put_recipe(sandbox)
    closed = gate(sandbox)
    with sandbox.start(*LAUNCH, *JOB, "--max-restarts", "0") as process:
        wait_at_gate(sandbox, process)
        os.kill(sandbox.named("ray::NodeAgent")[-1], signal.SIGTERM)
        wait_for(lambda: list(sandbox.folder.glob("signalled-*")), what="the notice to reach a rank")
        closed.unlink()  # ranks that went on without it could be at the end before it comes
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert " was sent SIGTERM; the same command goes on from step " in err
    run = run_of(sandbox)
    assert run.record()["state"] == "stopped"
    assert run.checkpoints()
    assert (run.path / "failures/0000.txt").read_text().startswith("Preempted: rank ")
