"""How ``nproc_per_node`` and ``placement`` are settled against the machines that there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dltrain.core.errors import JobError
from dltrain.core.job import Resources
from dltrain.launcher.demand import demand_here, demand_on
from dltrain.launcher.machine import usable_cpus

GPU8 = {"CPU": 96.0, "GPU": 8.0, "memory": 1e12}
GPU4 = {"CPU": 32.0, "GPU": 4.0}
CPU = {"CPU": 16.0}


@pytest.mark.parametrize(
    ("asked", "machines", "ranks", "gpus"),
    [
        ({"nproc_per_node": "auto"}, [CPU], 1, 0),
        ({"nproc_per_node": "auto"}, [CPU, GPU8], 8, 8),
        ({"nproc_per_node": "gpu", "nodes": 2}, [GPU8, GPU4, CPU], 4, 4),  # as many as both have
        ({"nproc_per_node": "gpu", "nodes": 2, "placement": "pack"}, [GPU8], 4, 4),
        ({"nproc_per_node": "gpu", "nodes": 3, "placement": "pack"}, [GPU8, GPU4], 4, 4),
        ({"nproc_per_node": "auto", "nodes": 2}, [GPU8, CPU], 1, 0),  # one machine alone has GPUs
        ({"nproc_per_node": "cpu", "nodes": 2}, [CPU, GPU4], 16, 0),
        ({"nproc_per_node": 2}, [CPU], 2, 0),
        ({"nproc_per_node": 2}, [CPU, GPU4], 2, 2),
    ],
)
def test_words_are_settled_by_what_every_node_can_have(
    asked: dict[str, object], machines: list[dict[str, float]], ranks: int, gpus: int
) -> None:
    demand = demand_on(Resources.model_validate(asked), machines)
    assert (demand.ranks, demand.gpus) == (ranks, gpus)
    assert demand.world == ranks * demand.nodes


@pytest.mark.parametrize(
    ("asked", "machines", "says"),
    [
        ({"nproc_per_node": "gpu"}, [CPU], "no GPUs for 1 nodes.*give a number"),
        ({"nodes": 2}, [CPU], "room for 1 of 2 nodes of 1 CPU.*placement pack"),
        ({"nodes": 2, "nproc_per_node": 9, "placement": "pack"}, [CPU], "room for 1 of 2 .*smaller --nproc-per-node"),
        ({"nproc_per_node": 16, "cpus_per_rank": 2}, [CPU], "room for 0 of 1 nodes of 32 CPU"),
        ({"nodes": 2, "nproc_per_node": 4}, [GPU4, CPU], "room for 1 of 2 nodes of 4 CPU, 4 GPU .*16 CPU"),
    ],
)
def test_what_a_cluster_can_never_hold_is_refused(
    asked: dict[str, object], machines: list[dict[str, float]], says: str
) -> None:
    with pytest.raises(JobError, match=f"(?s){says}"):
        demand_on(Resources.model_validate(asked), machines)


@pytest.mark.parametrize(
    ("machines", "nodes", "spares"),
    [
        ([CPU] * 5, 4, 1),
        ([CPU] * 4, 4, 0),
        ([CPU] * 3, 2, 1),  # 3 nodes cannot be dealt evenly
        ([CPU] * 2, 2, 0),
    ],
)
def test_a_run_that_may_have_fewer_nodes_begins_with_those_there_are(
    machines: list[dict[str, float]], nodes: int, spares: int
) -> None:
    demand = demand_on(Resources(nodes=4), machines, 1, lambda ranks: (2, 4))
    assert (demand.nodes, demand.spares) == (nodes, spares)
    with pytest.raises(JobError, match="room for 1 of 5 nodes"):
        demand_on(Resources(nodes=4), machines[:1], 1, lambda ranks: (2, 4))
    with pytest.raises(JobError, match=r"room for 4 of 5 nodes"):
        demand_on(Resources(nodes=4), [CPU] * 4, 1)


def test_logical_nodes_share_this_machines_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert demand_here(Resources(nodes=2)).ranks == 2
    assert demand_here(Resources(nodes=2, nproc_per_node=2)).gpus == 2
    with pytest.raises(
        JobError, match=r"(?s)2 × 3 ranks take a GPU each, and this machine has 4.*CUDA_VISIBLE_DEVICES="
    ):
        demand_here(Resources(nodes=2, nproc_per_node=3))
    with pytest.raises(JobError, match=r"(?s)a machine of their own each.*--address"):
        demand_here(Resources(nodes=2, placement="spread"))


def test_without_gpus_there_may_be_more_ranks_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    demand = demand_here(Resources(nodes=8, nproc_per_node=100))
    assert (demand.world, demand.gpus) == (800, 0)


@pytest.mark.parametrize(
    ("quota", "cpus"), [("max 100000", None), ("50000 100000", 1), ("100000 100000", 1), ("", None)], ids=str
)
def test_a_containers_quota_counts(tmp_path: Path, quota: str, cpus: int | None) -> None:
    (tmp_path / "cpu.max").write_text(quota, encoding="utf-8")
    assert usable_cpus(tmp_path) == (cpus or len(os.sched_getaffinity(0)))
    assert usable_cpus(tmp_path / "none") == len(os.sched_getaffinity(0))
