"""Nodes that are lost: which are, who takes their place, and that a run comes to the same numbers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
from dltrain.core.config import load_job
from dltrain.core.elastic import legal_nodes, settled
from dltrain.core.errors import JobError
from dltrain.launcher.chaos.machines import machines, why_not
from dltrain.launcher.staffing import Crew, Staffing, excluded, grown, silent_nodes, staff
from launching import Sandbox, said, wait_for
from ray_clusters import ray_on
from runs import RunFolder
from safetensors.numpy import load_file
from stage import (
    JOB,
    LAUNCH,
    STEPS,
    WAIT_AT,
    assert_same_run,
    ctrl_c,
    gate,
    put_recipe,
    run_of,
    uninterrupted,
    wait_at_gate,
)

# ---- which numbers of nodes


@pytest.mark.parametrize(
    ("job", "ranks", "microbatches", "legal"),
    [
        (("resources.nodes=4",), 1, "auto", (4,)),
        (("resources.nodes=4", "recovery.nodes=1:4"), 1, 4, (1, 2, 4)),
        (("resources.nodes=4", "recovery.nodes=3:4"), 1, 4, (4,)),
        (("resources.nodes=8", "recovery.nodes=4:8"), 2, 16, (4, 8)),
        (("resources.nodes=4", "recovery.nodes=1:4", "train.microbatches=12"), 1, 12, (1, 2, 3, 4)),
        (("resources.nodes=4", "recovery.nodes=1:4", "parallel.tensor=2"), 1, 2, (2, 4)),
        (("resources.nodes=2", "recovery.nodes=1:4"), 1, 4, (1, 2, 4)),
    ],
)
def test_a_job_keeps_its_microbatches_on_fewer_nodes(
    job: tuple[str, ...], ranks: int, microbatches: int | str, legal: tuple[int, ...]
) -> None:
    asked = load_job(None, job, {}, {}, whole=False).job
    assert settled(asked, ranks).train.microbatches == microbatches
    assert legal_nodes(asked, ranks) == legal


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ("recovery.nodes=4", "is no range of nodes: write the least and the most, like '4:8'"),
        ("recovery.nodes='8:4'", "has no nodes in it: the least comes first"),
        (
            "recovery.nodes=2:4 resources.nodes=8",
            "start with 8 nodes, which is not within 2:4 (resources.nodes may be 2 to 4)",
        ),
        (
            "recovery.nodes=2:4 resources.nodes=3 resources.nproc_per_node=1",
            "3 nodes cannot be dealt the microbatches of 4 (2 or 4 can; or set train.microbatches)",
        ),
        ("recovery.spare=1", "did you mean 'spares'?"),
    ],
)
def test_ranges_that_cannot_be(job: str, says: str) -> None:
    with pytest.raises(JobError) as refused:
        load_job(None, job.split(), {}, {})
    assert says in str(refused.value)


# ---- who is lost

QUIET = "its agent has not answered for 3 s"
MOVING, STANDING = {0: 0.1, 2: 0.2}, {0: 5.0, 2: 6.0}


@pytest.mark.parametrize(
    ("silence", "still", "here", "stopped", "lost"),
    [
        ({0: 0.0, 1: 2.9, 2: 0.0}, STANDING, (), (), {}),
        ({0: 0.0, 1: 3.1, 2: 0.0}, STANDING, (), (), {1: QUIET}),
        (
            {0: 0.0, 1: 3.1, 2: 3.1},
            STANDING,
            (),
            (),
            {1: QUIET, 2: QUIET},
        ),
        # the others get on, so its ranks do too: the machine is busy
        ({0: 0.0, 1: 3.1, 2: 0.0}, MOVING, (), (), {}),
        ({0: 0.0, 1: 30.1, 2: 0.0}, MOVING, (), (), {1: "its agent has not answered for 30 s"}),
        # what is known of a silent node's ranks is old
        ({0: 0.0, 1: 3.1, 2: 0.0}, {0: 5.0, 1: 0.0}, (), (), {1: QUIET}),
        # on this machine no link can be cut
        ({0: 0.0, 1: 3.1}, STANDING, (0, 1), (), {}),
        ({0: 0.0, 1: 30.1}, STANDING, (0, 1), (), {1: "its agent has not answered for 30 s"}),
        ({0: 0.0, 1: 3.1}, STANDING, (0, 1), (1,), {1: "its agent is stopped, and has not answered for 3 s"}),
        ({0: 0.0, 1: 3.1}, MOVING, (0, 1), (1,), {}),  # its ranks are not: it may go on
        ({0: 3.1}, {}, (), (), {0: QUIET}),
    ],
)
def test_silence(
    silence: dict[int, float],
    still: dict[int, float],
    here: tuple[int, ...],
    stopped: tuple[int, ...],
    lost: dict[int, str],
) -> None:
    assert silent_nodes(silence, still, here=here, stopped=stopped) == lost


# ---- who takes their place

FIXED = Crew(wanted=4, there=3, coming=True, waited=0.0, patience=60.0, sizes=(4,))
ELASTIC = replace(FIXED, sizes=(1, 2, 4))
LATE = 61.0


@pytest.mark.parametrize(
    ("crew", "staffing"),
    [
        (replace(FIXED, there=4), Staffing("go", 4)),  # a spare
        (replace(FIXED, there=5, waited=LATE), Staffing("go", 4)),
        (FIXED, Staffing("wait")),
        (replace(FIXED, coming=False), Staffing("wait")),  # a machine may come back
        (replace(FIXED, waited=LATE), Staffing("give_up")),
        (ELASTIC, Staffing("wait")),
        (replace(ELASTIC, coming=False), Staffing("go", 2)),
        (replace(ELASTIC, waited=LATE), Staffing("go", 2)),
        (replace(ELASTIC, there=0, coming=False), Staffing("wait")),
        (replace(ELASTIC, there=0, waited=LATE), Staffing("give_up")),
        (replace(ELASTIC, patience=0.0), Staffing("go", 2)),
        (replace(ELASTIC, sizes=(4,), there=3, patience=0.0), Staffing("give_up")),
    ],
)
def test_staffing(crew: Crew, staffing: Staffing) -> None:
    assert staff(crew) == staffing


def test_a_run_grows_to_the_largest_size_it_may_have() -> None:
    assert grown(2, 2, (1, 2, 4)) == 2
    assert grown(2, 3, (1, 2, 4)) == 2
    assert grown(2, 4, (1, 2, 4)) == 4
    assert grown(2, 9, (1, 2, 4)) == 4
    assert grown(3, 9, (3,)) == 3


def test_a_machine_is_avoided_after_three_failures() -> None:
    assert excluded(["a", "b", "a"]) == frozenset()
    assert excluded(["a", "b", "a", "b", "a"]) == {"a"}


# ---- launches


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return uninterrupted(tmp_path_factory.mktemp("reference"), "resources.cpus_per_rank=1")


@pytest.fixture
def box(sandbox: Sandbox) -> Sandbox:
    put_recipe(sandbox)
    return sandbox


LATER = 40  # the step before which the smaller run waits for another node


def agent_of(run: RunFolder, node: int) -> int:
    """The process of a node's agent."""
    hosts = json.loads((run.path / "environment.json").read_text())["hosts"]
    return hosts[node]["agent"]


@pytest.mark.parametrize(
    ("node", "signum", "says"),
    [
        (0, signal.SIGKILL, "its agent died"),
        (1, signal.SIGSTOP, "its agent is stopped, and has not answered for 3 s"),
    ],
)
def test_a_spare_takes_the_place_of_a_lost_node(
    box: Sandbox, reference: RunFolder, node: int, signum: signal.Signals, says: str
) -> None:
    closed = gate(box)
    with box.start(*LAUNCH, *JOB, "recovery.spares=1", "resources.cpus_per_rank=1") as process:
        wait_at_gate(box, process)
        wait_for(lambda: WAIT_AT in run_of(box).checkpoints(), what="the checkpoint before the gate")
        before = agent_of(run_of(box), node)
        for pid in (before, *box.named(f"dltrain-rank{node}")):
            with contextlib.suppress(ProcessLookupError):  # a killed agent takes its ranks with it
                os.kill(pid, signum)
        closed.unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert f"node {node} was lost: {says}; another" in out
    assert agent_of(run_of(box), node) != before
    assert_same_run(run_of(box), reference)
    text = (run_of(box).path / "failures/0000.txt").read_text()
    assert f"took the place of node {node}; all ranks were started again" in text
    assert text.startswith("A failure, recovered from: node")
    memory = f"in memory of 2 ranks, 1 of them from node {1 - node}'s copy"  # which there may be of that step or not
    went_on = rf"It went on from step 20, (the newest checkpoint|{memory}): \d+ steps? done again, \d+\.\d s"
    assert re.search(went_on, text), text


@pytest.mark.slow
def test_metrics_of_a_node_whose_agent_alone_is_stopped_are_not_lost(box: Sandbox) -> None:
    """Its ranks get on, and no checkpoint of theirs may be ahead of the metrics that the agent holds up."""
    closed = gate(box)
    long = ("train.steps=1000000", "train.evaluate_every=1000000", "checkpoint.every=8s", "recovery.spares=1")
    with box.start(*LAUNCH, *JOB, *long, "resources.cpus_per_rank=1") as process:
        wait_at_gate(box, process)
        run = run_of(box)
        os.kill(agent_of(run, 1), signal.SIGSTOP)
        closed.unlink()
        wait_for(lambda: run.record()["generations"] > 1, what="the start on the spare", timeout=120)
        before = len(run.steps())
        wait_for(lambda: len(run.steps()) > before, what="steps on the spare", timeout=120)
        ctrl_c(process)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, out + err
    assert re.search(r"node 1 was lost: its agent [a-z, ]+ for 30 s; another", out), out
    assert run.steps() == list(range(1, len(run.steps()) + 1))


@pytest.mark.campaign
def test_a_machine_that_was_cut_off_does_no_harm_when_it_is_back(
    box: Sandbox, reference: RunFolder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with machines(3) as three, ray_on(three, tmp_path_factory.mktemp("ray"), "--num-cpus=1") as ray:
        box.prefix = three[0].prefix
        closed, later = gate(box), gate(box, LATER)
        on = ("--address", ray.address, "recovery.spares=1", "resources.cpus_per_rank=1")
        with box.start(*LAUNCH, *JOB, *on, **ray.environ) as process:
            wait_at_gate(box, process)
            wait_for(lambda: WAIT_AT in run_of(box).checkpoints(), what="the checkpoint before the gate")
            three[1].cut()
            closed.unlink()
            wait_for(lambda: run_of(box).record()["generations"] > 1, what="the start on the spare", timeout=60)
            for stale in box.folder.glob("waiting-*"):
                stale.unlink()
            wait_at_gate(box, process)
            wait_for(lambda: not three[1].named("dltrain-rank"), what="the end of ranks that nobody hears", timeout=60)
            three[1].heal()
            wait_for(lambda: not three[1].named("ray::NodeAgent"), what="the end of the lost agent", timeout=60)
            later.unlink()
            out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "node 1 was lost: its agent has not answered for 3 s; another (m2) took the place of node 1" in out
    assert_same_run(run_of(box), reference)


@pytest.mark.parametrize("numerics", ["fast", pytest.param("reproducible", marks=pytest.mark.slow)])
def test_a_run_shrinks_and_grows_again_without_losing_a_step(
    box: Sandbox, reference: RunFolder, tmp_path_factory: pytest.TempPathFactory, numerics: str
) -> None:
    closed, later = gate(box), gate(box, LATER)
    with box.start("launch", "--nodes", "1:2", *JOB, "recovery.node_wait=0", f"numerics={numerics}") as process:
        wait_at_gate(box, process)
        wait_for(lambda: WAIT_AT in run_of(box).checkpoints(), what="the checkpoint before the gate")
        os.kill(agent_of(run_of(box), 1), signal.SIGKILL)
        wait_for(lambda: run_of(box).record()["generations"] > 1, what="another start", timeout=120)
        closed.unlink()
        begin = said(process, "there are 2 nodes now instead of 1: saving a checkpoint to go on with all", timeout=120)
        later.unlink()  # the rank has been told, and asks for such words before it has come to the end
        out, err = process.communicate(timeout=120)
    out = begin + out
    assert process.returncode == 0, out + err
    assert "the run goes on with 1 node instead of 2" in out
    run = run_of(box)
    assert run.steps() == list(range(1, STEPS + 1))
    assert run.record()["generations"] == 3
    assert re.search(rf"from step \d\d to step {STEPS}", out), out
    if numerics == "reproducible":
        assert_same_run(run, uninterrupted(tmp_path_factory.mktemp("reproducible"), "numerics=reproducible"))
        return
    assert run.losses() == pytest.approx(reference.losses(), rel=1e-5)
    ours, theirs = (load_file(path.path / "weights.safetensors") for path in (run, reference))
    for name, whole in theirs.items():
        np.testing.assert_allclose(ours[name], whole, rtol=0, atol=1e-6)
