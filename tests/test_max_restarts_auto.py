"""``recovery.max_restarts: auto``, the default: a run goes on after what came from outside, and only after that."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import pytest
from dltrain.core.recovery import RecoverySpec
from dltrain.training.connections import is_broken_connection
from launching import Sandbox, wait_for
from runs import RunFolder
from stage import JOB, LAUNCH, WAIT_AT, assert_same_run, gate, put_recipe, run_of, wait_at_gate
from test_lifecycle import victim
from torch.distributed import DistNetworkError

AGAIN = "starting all ranks again"


@pytest.fixture
def box(sandbox: Sandbox) -> Sandbox:
    put_recipe(sandbox)
    return sandbox


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "dltrain-rank1",
            f"rank 1 on node 1 failed with SIGKILL; {AGAIN} from step 20, in the memory of 2 ranks; report",
        ),
        pytest.param("ray::NodeAgent", f"the place of node [01]; {AGAIN}, but not from memory", marks=pytest.mark.slow),
        pytest.param("fork server", f"the place of node 1; {AGAIN}; report", marks=pytest.mark.slow),
    ],
)
def test_a_plain_run_survives_whatever_is_killed(box: Sandbox, reference: RunFolder, name: str, says: str) -> None:
    closed = gate(box)
    with box.start(*LAUNCH, *JOB) as process:
        wait_at_gate(box, process)
        wait_for(lambda: WAIT_AT in run_of(box).checkpoints(), what="the checkpoint before the gate")
        os.kill(victim(box, name), signal.SIGKILL)
        closed.unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert re.search(says, out), out
    assert_same_run(run_of(box), reference)


@pytest.mark.parametrize("job", ["model.raise_at=25", "model.allocate_at=25"])
def test_what_the_program_did_ends_a_plain_run_at_once(box: Sandbox, job: str) -> None:
    done = box.run(*LAUNCH, *JOB, job, "model.rank=1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert AGAIN not in done.stdout
    (report,) = (run_of(box).path / "failures").glob("*.txt")
    assert report.read_text().startswith("The run failed: rank 1 on node 1 failed with ")


def kill_at_the_gate(box: Sandbox, process: subprocess.Popen[str], generation: int) -> None:
    """Kill rank 1 of a generation once its ranks stand at the gate; those of the one before have ended then."""
    wait_for(lambda: run_of(box).record()["generations"] > generation, what="the start", timeout=120)
    for stale in box.folder.glob("waiting-*"):
        stale.unlink()
    wait_at_gate(box, process)
    os.kill(box.named("dltrain-rank1")[0], signal.SIGKILL)


def test_a_run_that_is_killed_three_times_without_a_step_in_between_ends(box: Sandbox) -> None:
    gate(box)
    with box.start(*LAUNCH, *JOB) as process:
        wait_at_gate(box, process)
        for generation in range(3):
            kill_at_the_gate(box, process, generation)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert "rank 1 on node 1 failed with SIGKILL; that happened 3 times without a new step in between" in err
    assert out.count(AGAIN) == 2
    assert len(list((run_of(box).path / "failures").glob("*.txt"))) == 3


def test_a_script_is_not_started_again_unasked(sandbox: Sandbox) -> None:
    text = "import os, signal\nprint('here')\nos.kill(os.getpid(), signal.SIGKILL)\n"
    (sandbox.folder / "dies.py").write_text(text, encoding="utf-8")
    done = sandbox.run("launch", "--max-restarts", "auto", "dies.py")
    assert done.returncode == 1, done.stdout + done.stderr
    assert (AGAIN in done.stdout, done.stdout.count("here")) == (False, 1)
    assert RecoverySpec(max_restarts=3).for_script().max_restarts == 3


@pytest.mark.parametrize(
    ("spec", "nodes", "machines", "copies"),
    [
        ({}, 2, 1, False),  # the embedded cluster's nodes
        ({}, 2, 2, True),
        ({}, 1, 1, False),
        ({"spares": 1}, 2, 1, True),
        ({"nodes": "1:2"}, 2, 1, True),
        ({"max_restarts": 1}, 2, 1, True),
        ({"max_restarts": 0}, 2, 2, False),
        ({"copies": False}, 2, 2, False),
        ({"snapshot": "never"}, 2, 2, False),
    ],
)
def test_copies_are_made_unasked_only_on_other_machines(
    spec: dict[str, object], nodes: int, machines: int, copies: bool
) -> None:
    assert RecoverySpec.model_validate(spec).copies_among(nodes, machines=machines) is copies


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:{line}] {what}"


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (RuntimeError(GLOO.format(line=537, what="Read error [10.0.0.1]:53684: Connection reset by peer")), True),
        (RuntimeError(GLOO.format(line=550, what="Connection closed by peer [10.0.0.1]:53684")), True),
        (DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed by peer: Broken pipe"), True),
        (RuntimeError(GLOO.format(line=90, what="Timed out waiting 1800000ms for recv operation to complete")), False),
        (RuntimeError("the database says: connection reset by peer"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (ValueError("gloo: Connection reset by peer"), False),
    ],
)
def test_a_broken_connection_is_told_from_an_error(error: Exception, broken: bool) -> None:
    assert is_broken_connection(error) is broken
