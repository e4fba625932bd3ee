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
from typing import Any

import pytest
from dltrain.checkpoint.image import read_head
from dltrain.launcher.messages import HeldImage
from dltrain.launcher.node_memory import NodeMemory
from launching import Sandbox, wait_for
from machines import machines, why_not
from ranks import preload, train_ranks
from ray_clusters import ray_on
from runs import RunFolder
from stage import JOB, WAIT_AT, assert_same_run, gate, put_recipe, run_of, wait_at_gate

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


def copied(agent: int) -> set[tuple[int, int]]:
    """Rank and step of the copies that an agent holds of other nodes' images, as far as they are complete."""
    found: set[tuple[int, int]] = set()
    for link in Path(f"/proc/{agent}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "dltrain-copy" in str(link.readlink()):
                fd = os.open(link, os.O_RDONLY)
                head = read_head(fd)
                os.close(fd)
                if head is not None and head[1]:
                    found.add((head[0].rank, head[0].step))
    return found


def wait_for_copies(holders: Sequence[int], ranks: int = NODES, since: int = 0) -> int:
    """Wait until every rank's image of a step after ``since`` has been copied to the agents ``holders``; the step."""

    def newest() -> int:
        found = set[tuple[int, int]]().union(*(copied(agent) for agent in holders))
        steps = {step for _, step in found if step > since}
        return max((step for step in steps if all((rank, step) in found for rank in range(ranks))), default=0)

    found = wait_for(newest, what="copies of every rank's snapshot")
    assert isinstance(found, int)
    return found


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


def costs(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(path.read_text())["cost"] for path in sorted((run.path / "failures").glob("*.json"))]


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
    closed = gate(box)
    with box.start(*launch(1), *job) as process:
        wait_at_gate(box, process, NODES)
        step = wait_for_copies(agents(run_of(box)))
        lose(box, 1)
        closed.unlink()
        out = finish(process)
    run = run_of(box)
    assert_same_run(run, reference(tmp_path_factory.mktemp("reference"), *job))
    (cost,) = costs(run)
    assert step <= cost["from_step"] < WAIT_AT
    assert cost["origin"] == "in memory of 3 ranks, 1 of them from node 2's copy"
    where = rf"from step {cost['from_step']}, in the memory of 3 ranks, 1 of them from node 2's copy; report"
    assert re.search(rf"took the place of node 1; starting all ranks again {where}", out), out


@pytest.mark.slow
def test_nodes_that_are_lost_one_after_the_other_are_gone_on_from_in_memory(
    box: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    closed, later = gate(box), gate(box, LATER)
    with box.start(*launch(2)) as process:
        wait_at_gate(box, process, NODES)
        first = wait_for_copies(agents(run_of(box)))
        lose(box, 1)
        for stale in box.folder.glob("waiting-*"):
            stale.unlink()
        closed.unlink()
        wait_at_gate(box, process, NODES)
        second = wait_for_copies(agents(run_of(box)), since=first)
        lose(box, 2)
        later.unlink()
        finish(process)
    run = run_of(box)
    assert_same_run(run, reference(tmp_path_factory.mktemp("reference")))
    steps = [cost["from_step"] for cost in costs(run)]
    assert first <= steps[0] < WAIT_AT
    assert second <= steps[1] < LATER
    assert [cost["origin"] for cost in costs(run)] == [
        f"in memory of 3 ranks, 1 of them from node {node}'s copy" for node in (2, 0)
    ]


@pytest.mark.slow
def test_a_node_lost_with_the_one_that_has_its_copies_is_gone_on_from_at_the_newest_checkpoint(
    box: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    closed = gate(box)
    with box.start(*launch(2), "checkpoint.every=15") as process:
        wait_at_gate(box, process, NODES)
        wait_for(lambda: 15 in run_of(box).checkpoints(), what="a checkpoint")
        wait_for_copies(agents(run_of(box)))
        lose(box, 1, 2)
        closed.unlink()
        out = finish(process)
    run = run_of(box)
    assert_same_run(run, reference(tmp_path_factory.mktemp("reference"), "checkpoint.every=15"))
    assert "starting all ranks again, but not from memory: no node that is left has a snapshot of rank 1; report" in out
    (cost,) = costs(run)
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
    (cost,) = costs(run)
    assert step <= cost["from_step"] < WAIT_AT
    assert cost["origin"] == "in memory of 2 ranks, 1 of them from node 0's copy"
