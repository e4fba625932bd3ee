"""``recovery.max_restarts: auto``, the default: a run goes on after what came from outside, and only after that."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dltrain.core.recovery import RecoverySpec
from dltrain.launcher.failure import Casualty
from dltrain.launcher.generation import Generation
from dltrain.launcher.messages import HeldImage, Point, RankBeat
from dltrain.launcher.policy import Decision, RankFailure, Stall
from dltrain.launcher.recall import Recall
from dltrain.launcher.staffing import Crew
from dltrain.launcher.stall import StallWatch, Standstill
from dltrain.launcher.succession import Succession
from dltrain.training.connections import is_broken_connection
from launching import Sandbox, wait_for
from runs import RunFolder
from stage import JOB, LAUNCH, WAIT_AT, assert_same_run, gate, put_recipe, run_of, wait_at_gate
from test_lifecycle import victim
from test_policy import CUT_OFF, KILLED, RAISED, STOPPED, STUCK
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


def test_steps_count_that_no_row_of_metrics_tells_of(box: Sandbox) -> None:
    closed = [gate(box, step) for step in (20, 45, 75)]
    heard = box.folder / "signalled-1"
    sparse = ("train.steps=150", "train.log_every=1000", "train.evaluate_every=1000")
    with box.start(*LAUNCH, *JOB, *sparse) as process:
        for path in closed:
            wait_at_gate(box, process)
            heard.unlink(missing_ok=True)
            os.kill(box.named("dltrain-rank1")[0], signal.SIGTERM)
            wait_for(heard.exists, what="the signal to be heard")
            path.unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert out.count(AGAIN) == 3


def test_the_newest_step_is_one_that_a_rank_was_seen_to_come_to() -> None:
    watch = StallWatch("auto", 60.0)
    for second, (step, phase) in enumerate([(40, "forward"), (-1, "setup"), (30, "data")]):
        watch.take(0, [RankBeat(0, step, phase, 0.5)], float(second))
    assert watch.newest == 30  # the first beat was of the generation before
    watch.take(0, [], 3.0)
    assert watch.newest == 30
    assert Generation(1, 1, 1, step=20).reached(-1, 25, watch.newest) == 30


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


STORE_GONE = "Connection was likely closed. Did the remote server shutdown or crash?"  # torch's c10d/Utils.hpp
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:{line}] {what}"


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (RuntimeError(GLOO.format(line=537, what="Read error [10.0.0.1]:53684: Connection reset by peer")), True),
        (RuntimeError(GLOO.format(line=550, what="Connection closed by peer [10.0.0.1]:53684")), True),
        (DistNetworkError(f"Failed to recv, got 0 bytes. {STORE_GONE}"), True),
        (DistNetworkError(f"Failed to send, sent 0 bytes. {STORE_GONE}"), True),
        (DistNetworkError("The client socket has failed to connect to n1:29500 (errno: 113 - No route to host)"), True),
        (RuntimeError(GLOO.format(line=144, what="connect [10.0.0.1]:53684: Network is unreachable")), True),
        (RuntimeError(GLOO.format(line=90, what="Timed out waiting 1800000ms for recv operation to complete")), False),
        (RuntimeError("the database says: connection reset by peer"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (ValueError("gloo: Connection reset by peer"), False),
    ],
)
def test_a_broken_connection_is_told_from_an_error(error: Exception, broken: bool) -> None:
    assert is_broken_connection(error) is broken


def ended(*failures: RankFailure, stall: RankFailure | None = None, **facts: Any) -> Generation:
    """A generation of one rank a failure, and how it has ended."""
    casualties = {failure.rank: Casualty(failure, "", Path()) for failure in failures}
    still = Standstill(Stall(12.0, "setup", (stall,)), (), {}) if stall is not None else None
    return Generation(1, 1, 1, casualties=casualties, standstill=still, **facts)


@pytest.mark.parametrize(
    ("failures", "stall", "kept"),
    [
        ([KILLED], None, True),
        ([CUT_OFF], None, True),
        ([CUT_OFF, KILLED], None, True),
        ([], STOPPED, True),
        ([RAISED], None, False),
        ([CUT_OFF, RAISED], None, False),
        ([], STUCK, False),
    ],
)
def test_a_snapshot_is_kept_that_ranks_were_kept_from_going_on_from(
    failures: Sequence[RankFailure], stall: RankFailure | None, kept: bool
) -> None:
    point = Point(generation=0, step=40, world=1)
    image = HeldImage(point.generation, point.step, rank=0, world=1, row=40, size=8)
    intake: Any = SimpleNamespace(saved=30, recover=lambda *_: None)
    metrics: Any = SimpleNamespace(last_step=40)
    answers: dict[str, dict[int, Any]] = {"snapshots": {0: [image]}, "rows": {}}
    recall = Recall(intake, metrics, nproc=1)
    origin = recall.find(ended(*failures, stall=stall, point=point), lambda what, *_, waiting_for: answers[what])
    assert origin.point == (point if kept else None)


def test_a_failure_that_was_told_is_waited_for_until_its_rank_has_ended() -> None:
    generation = Generation(1, 3, 1, said={0: {"witness": True}})
    assert not generation.told()
    generation.said[1] = {"witness": False}
    assert generation.told()
    generation.exited.add(1)
    assert not generation.told()


@pytest.mark.parametrize(
    ("decision", "blamed"),
    [
        (Decision("restart", culprit=KILLED), [KILLED.node]),
        (Decision("restart", culprit=CUT_OFF), []),
        (Decision("restart", culprit=KILLED, counts=False), []),  # it was told to end
    ],
)
def test_a_machine_is_blamed_for_what_happened_on_it_only(decision: Decision, blamed: list[int]) -> None:
    found: list[int] = []
    crew = Crew(wanted=2, there=2, coming=False, waited=0.0, patience=1.0, sizes=(2,))
    roster: Any = SimpleNamespace(blame=found.append, tick=lambda: None, crew=lambda _: crew, settle=lambda _: "")
    idle: Any = None
    succession = Succession(roster, RecoverySpec(), view=idle, stop=idle, meanwhile=idle)
    assert succession.settle(Generation(1, 2, 1), decision) == (decision, "")
    assert found == blamed
