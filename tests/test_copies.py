"""Copies of snapshots in memory on another node: a lost node is no reason to go back to the newest checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from dltrain.checkpoint.image import read_head
from dltrain.launcher.chaos.machines import machines, why_not
from dltrain.launcher.messages import HeldImage
from dltrain.launcher.node_memory import NodeMemory
from launching import Sandbox, wait_for
from ranks import preload, train_ranks
from ray_clusters import ray_on
from runs import RunFolder
from stage import JOB, WAIT_AT, assert_same_run, gate, put_recipe, run_of, wait_at_gate

pytestmark = pytest.mark.timeout(900)
preload("dltrain.strategies.deepspeed_engine")

NODES = 3
SAME = (*JOB, "train.microbatches=6", "train.global_batch=60")
AGAIN = (*SAME, "recovery.snapshot=1", "resources.cpus_per_rank=1")
LATER = 40


class Restarted(NodeMemory):
    """A node whose ranks have been started again."""

    def __init__(self) -> None:
        super().__init__()
        self._generation = 3


def test_a_node_takes_no_copies_from_an_older_generation() -> None:
    node = Restarted()
    image = HeldImage(2, 7, 0, 2, 7, 5000)
    assert node.receive(2, image, [], 4096, b"older") == "ranks have been started again since (generation 3, not 2)"
    assert not node.receive(3, image, [], 4096, b"newer")


# ---- launches


def reference(folder: Path, *job: str, nodes: int = NODES) -> RunFolder:
    put_recipe(Sandbox(folder))
    run = train_ranks(folder, nodes, *SAME, "checkpoint.every=50", *job)
    run.export()
    return run


def agents(run: RunFolder) -> list[int]:
    """The processes of the nodes' agents."""
    return [host["agent"] for host in json.loads((run.path / "environment.json").read_text())["hosts"]]


def copied(agent: int) -> set[tuple[int, int, int]]:
    """Rank, generation and step of the copies that an agent holds of other nodes' images, if they are complete."""
    found: set[tuple[int, int, int]] = set()
    for link in Path(f"/proc/{agent}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "dltrain-copy" in str(link.readlink()):
                fd = os.open(link, os.O_RDONLY)
                head = read_head(fd)
                os.close(fd)
                if head is not None and head[1]:
                    found.add((head[0].rank, head[0].generation, head[0].step))
    return found


def wait_for_copies(holders: Sequence[int], ranks: int = NODES, generation: int = 0, timeout: float = 60.0) -> int:
    """Wait until the agents ``holders`` have every rank's image of a step of ``generation``; the step."""

    def newest() -> int:
        found = set[tuple[int, int, int]]().union(*(copied(agent) for agent in holders))
        steps = {step for _, number, step in found if number == generation}
        whole = (step for step in steps if all((rank, generation, step) in found for rank in range(ranks)))
        return max(whole, default=0)

    found = wait_for(newest, what="copies of every rank's snapshot", timeout=timeout)
    assert isinstance(found, int)
    return found


def hold_with_copies(box: Sandbox, process: subprocess.Popen[str], *gates: Path, generation: int = 0) -> int:
    """Have ranks of ``generation`` stand at the first of ``gates`` with copies of a snapshot of theirs; its step.

    Which snapshot is copied is settled now and then, and none is where a rank could not take it: on a busy machine that
    may be all before a gate.
    """
    for closed in gates[:-1]:
        wait_at_gate(box, process, NODES)
        with contextlib.suppress(AssertionError):
            return wait_for_copies(agents(run_of(box)), generation=generation, timeout=15)
        closed.unlink()
        for stale in box.folder.glob("waiting-*"):
            stale.unlink()
    wait_at_gate(box, process, NODES)
    return wait_for_copies(agents(run_of(box)), generation=generation)


def lose(box: Sandbox, *nodes: int) -> None:
    """Kill nodes' agents, and with each its rank."""
    run = run_of(box)
    killed = [*(agents(run)[node] for node in nodes), *(pid for n in nodes for pid in box.named(f"dltrain-rank{n}"))]
    for pid in killed:
        with contextlib.suppress(ProcessLookupError):  # ranks end with their agent
            os.kill(pid, signal.SIGKILL)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    return out


def launch(spares: int, nodes: int = NODES) -> tuple[str, ...]:
    return "launch", "--nodes", str(nodes), *AGAIN, f"recovery.spares={spares}", "checkpoint.every=50"


@pytest.fixture
def box(sandbox: Sandbox) -> Sandbox:
    put_recipe(sandbox)
    return sandbox


@pytest.mark.parametrize(
    "job",
    [
        (),
        pytest.param(("parallel.strategy=fsdp",), marks=pytest.mark.slow),
        pytest.param(("parallel.strategy=zero1",), marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp", "zero1"],
)
def test_a_lost_node_is_gone_on_from_in_memory(
    box: Sandbox, tmp_path_factory: pytest.TempPathFactory, job: tuple[str, ...]
) -> None:
    gates = gate(box), gate(box, 30), gate(box, LATER)
    with box.start(*launch(1), *job) as process:
        step = hold_with_copies(box, process, *gates)
        lose(box, 1)
        for closed in gates:
            closed.unlink(missing_ok=True)
        out = finish(process)
    run = run_of(box)
    assert_same_run(run, reference(tmp_path_factory.mktemp("reference"), *job))
    (cost,) = run.costs()
    assert step <= cost["from_step"] <= LATER
    assert cost["origin"] == "in memory of 3 ranks, 1 of them from node 2's copy"
    where = rf"from step {cost['from_step']}, in the memory of 3 ranks, 1 of them from node 2's copy; report"
    assert re.search(rf"took the place of node 1; starting all ranks again {where}", out), out


@pytest.mark.slow
def test_nodes_that_are_lost_one_after_the_other_are_gone_on_from_in_memory(
    box: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    early, late = (gate(box), gate(box, 30)), (gate(box, LATER), gate(box, 50))
    with box.start(*launch(2)) as process:
        first = hold_with_copies(box, process, *early)
        lose(box, 1)
        for closed in early:
            closed.unlink(missing_ok=True)
        for stale in box.folder.glob("waiting-*"):
            stale.unlink()
        second = hold_with_copies(box, process, *late, generation=1)
        lose(box, 2)
        for closed in late:
            closed.unlink(missing_ok=True)
        finish(process)
    run = run_of(box)
    assert_same_run(run, reference(tmp_path_factory.mktemp("reference")))
    steps = [cost["from_step"] for cost in run.costs()]
    assert first <= steps[0] <= 30
    assert second <= steps[1] <= 50
    assert [cost["origin"] for cost in run.costs()] == [
        f"in memory of 3 ranks, 1 of them from node {node}'s copy" for node in (2, 0)
    ]


@pytest.mark.slow
def test_a_node_lost_with_the_one_that_has_its_copies_is_gone_on_from_at_the_newest_checkpoint(
    box: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    gates = gate(box), gate(box, 25)
    with box.start(*launch(2), "checkpoint.every=15") as process:
        hold_with_copies(box, process, *gates)
        wait_for(lambda: 15 in run_of(box).checkpoints(), what="a checkpoint")
        lose(box, 1, 2)
        for closed in gates:
            closed.unlink(missing_ok=True)
        out = finish(process)
    run = run_of(box)
    assert_same_run(run, reference(tmp_path_factory.mktemp("reference"), "checkpoint.every=15"))
    assert "starting all ranks again, but not from memory: no node that is left has a snapshot of rank 1; report" in out
    (cost,) = run.costs()
    assert (cost["from_step"], cost["origin"]) == (15, "the newest checkpoint")


@pytest.mark.campaign
def test_a_machine_that_is_lost_is_gone_on_from_in_the_memory_of_another(
    box: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with machines(3) as three, ray_on(three, tmp_path_factory.mktemp("ray"), "--num-cpus=1") as ray:
        box.prefix = three[0].prefix
        closed = gate(box)
        with box.start(*launch(1, nodes=2), "--address", ray.address, **ray.environ) as process:
            wait_at_gate(box, process, 2)
            step = wait_for_copies([pid for each in three for pid in each.named("ray::NodeAgent")], ranks=2)
            three[1].pull_the_cable()
            closed.unlink()
            out = finish(process)
    run = run_of(box)
    assert_same_run(run, reference(tmp_path_factory.mktemp("reference"), nodes=2))
    assert "node 1 was lost: its agent has not answered for 3 s; another (m2) took the place of node 1" in out
    (cost,) = run.costs()
    assert step <= cost["from_step"] <= WAIT_AT
    assert cost["origin"] == "in memory of 2 ranks, 1 of them from node 0's copy"
