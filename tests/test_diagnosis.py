"""What ``dltrain doctor`` makes of what was measured."""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from dltrain.launcher.diagnosis import Asked, Finding, Link, Measured, diagnose, slower
from dltrain.launcher.doctor import describe, measured_of
from dltrain.launcher.messages import NodeInfo
from dltrain.launcher.vitals import Gpu, Vitals, parse_smi
from dltrain.training import links as measuring
from dltrain.training.links import rounds, sound_of

WELL = Vitals(at=0.0, memory=64 << 30, disks={"/tmp": 99 << 30}, shm=1 << 30, files=65536, gpus=())
GPU = Gpu(0, "NVIDIA H100 80GB HBM3", 81559.0, 4.0, 41.0, 0.0)


def node(number: int, **versions: str) -> NodeInfo:
    return NodeInfo(
        *(number, f"m{number}", f"10.0.0.{number}", f"ray{number}", 1, "eth0", (0,), 1, ((0,),), ()), versions=versions
    )


def well(count: int) -> dict[int, Asked]:
    return {number: Asked(WELL, 0.0, 0.01) for number in range(count)}


def links(count: int, *, slow: dict[int, float] | None = None, noise: float = 0.0, seed: int = 0) -> tuple[Link, ...]:
    """Links of 10 Gbit/s and 0.1 ms, but through a slow node; up to ``noise`` of each is lost to something else."""
    draw = random.Random(seed)
    found: list[Link] = []
    for one, other in itertools.combinations(range(count), 2):
        share = min((slow or {}).get(one, 1.0), (slow or {}).get(other, 1.0)) * (1 - noise * draw.random())
        found.append(Link(one, other, 1e-4, 1.25e9 * share))
    return tuple(found)


def sick(findings: list[Finding]) -> set[tuple[int, ...]]:
    return {finding.nodes for finding in findings if finding.sick}


@pytest.mark.parametrize("count", [3, 4, 8])
def test_the_slow_node_is_named_and_no_other_however_noisy(count: int) -> None:
    nodes = [node(number) for number in range(count)]
    for seed in range(20):
        quiet = Measured(links=links(count, noise=0.4, seed=seed), flops=dict.fromkeys(range(count), 1e11))
        assert not diagnose(nodes, well(count), quiet)
        victim = seed % count
        shaped = replace(quiet, links=links(count, slow={victim: 0.1}, noise=0.4, seed=seed))
        findings = diagnose(nodes, well(count), shaped)
        assert sick(findings) == {(victim,)}
        assert describe(findings[0], nodes).startswith(f"node {victim} (m{victim}): its network link has ")


def test_what_was_slow_for_a_moment_is_forgotten_when_it_is_measured_again() -> None:
    nodes = [node(number) for number in range(4)]
    busy = Measured(links(4, slow={1: 0.1}), 1e8, {0: 1e11, 1: 1e10, 2: 1e11, 3: 1e11}, {3: "no connection"})
    again = Measured(links(4, slow={2: 0.1}), 2e8, {0: 9e10, 1: 1e11, 2: 2e10, 3: 1e11}, {})
    assert sick(slower(nodes, busy)) == {(1,)}
    assert sick(slower(nodes, again)) == {(2,)}
    best = busy.or_better(again)
    assert not slower(nodes, replace(best, links=tuple(k for k in best.links if (k.one, k.other) != (1, 2))))
    assert (best.all_reduce, best.flops[1], best.failed) == (2e8, 1e11, {})  # measured once, it can be
    assert busy.or_better(busy).failed == {3: "no connection"}
    lasting = replace(again, links=links(4, slow={1: 0.1}))
    assert sick(slower(nodes, busy.or_better(lasting))) == {(1,)}


def test_one_slow_link_between_two_good_nodes_is_the_links() -> None:
    nodes = [node(number) for number in range(5)]
    found = [replace(k, bandwidth=1e7) if (k.one, k.other) == (1, 3) else k for k in links(5)]
    findings = diagnose(nodes, well(5), Measured(links=tuple(found)))
    assert sick(findings) == {(1, 3)}
    assert describe(findings[0], nodes).startswith("node 1 (m1) and node 3 (m3): the link between them has 80 Mbit/s")


def test_latency_compute_and_what_has_no_like() -> None:
    nodes = [node(number) for number in range(4)]
    late = tuple(replace(k, latency=2e-3) if 2 in (k.one, k.other) else k for k in links(4))
    assert sick(diagnose(nodes, well(4), Measured(links=late))) == {(2,)}
    slow = Measured(flops={0: 1e11, 1: 1e11, 2: 1e11, 3: 2e10})
    assert sick(diagnose(nodes, well(4), slow)) == {(3,)}
    logical = [replace(n, ray_node="same") for n in nodes]
    assert not diagnose(logical, well(4), replace(slow, links=late))  # one machine: its cores, and no network
    two = Measured(links=links(2, slow={1: 0.1}), flops={0: 1e11, 1: 1e11})
    assert not diagnose(nodes[:2], well(2), two)  # nobody can say which of two it is


class Lopsided:
    """Stands for torch.distributed between two threads: what node 1 sends in large messages takes long."""

    def __init__(self) -> None:
        self.me = threading.local()
        self.to: tuple[queue.Queue[torch.Tensor], ...] = (queue.Queue(), queue.Queue())
        self.sizes: list[int] = []

    def send(self, message: torch.Tensor, other: int) -> None:
        if self.me.rank == 1 and message.numel() >= 1 << 20:
            time.sleep(0.03)
        self.sizes.append(message.numel())
        self.to[other].put(message.clone())

    def recv(self, message: torch.Tensor, other: int) -> None:
        message.copy_(self.to[1 - other].get(timeout=60))


def test_messages_are_no_larger_than_the_slower_of_the_two_directions_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Lopsided()
    monkeypatch.setattr(measuring, "dist", line)
    found: dict[int, tuple[float, float]] = {}

    def node(rank: int) -> None:
        line.me.rank = rank
        found[rank] = measuring._pair(1 - rank, first=rank == 0)

    both = [threading.Thread(target=node, args=(rank,)) for rank in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    assert max(line.sizes) == 1 << 20  # of what the first one sends, more would have passed in no time
    assert found[1][1] < (1 << 20) / 0.03 < found[0][1]


@pytest.mark.parametrize(
    ("vitals", "says", "is_sick"),
    [
        (replace(WELL, memory=100 << 20), "only 100 MiB of memory are free", True),
        (replace(WELL, disks={"/runs": 1 << 30}), "only 1.0 GiB are free in /runs", True),
        (replace(WELL, shm=8 << 20), "only 8 MiB are free in /dev/shm", True),
        (replace(WELL, files=256), "a process may open only 256 files", False),
        (replace(WELL, trouble=("cannot write to s3://b: denied",)), "cannot write to s3://b: denied", True),
        (replace(WELL, gpus=(replace(GPU, ecc_errors=3.0),)), "has had 3 memory errors", True),
        (replace(WELL, gpus=(replace(GPU, temperature=93.0),)), "is at 93 °C", True),
        (replace(WELL, gpus=(replace(GPU, used=70000.0),)), "70000 of 81559 MiB are taken", False),
    ],
)
def test_the_state_of_a_machine(vitals: Vitals, says: str, is_sick: bool) -> None:
    findings = diagnose([node(0)], {0: Asked(vitals, 0.0, 0.01)}, Measured())
    assert [says in findings[0].what, findings[0].sick, len(findings)] == [True, is_sick, 1]


def test_clocks_and_versions_are_told_by_the_most() -> None:
    nodes = [node(number, torch="2.13.0", python="3.11.7") for number in range(3)]
    nodes[1] = node(1, torch="2.12.0", python="3.11.7")
    asked = well(3) | {2: Asked(WELL, -7.5, 0.2)}
    first, second = diagnose(nodes, asked, Measured())
    assert (first.nodes, first.what, first.sick) == ((1,), "torch 2.12.0, where others have 2.13.0", True)
    assert (second.nodes, second.what, second.sick) == ((2,), "its clock is 7.5 s behind", False)
    assert not diagnose(nodes[:1], {0: asked[2]}, Measured())  # a single clock is ahead of nobody's


def test_of_two_directions_the_worse_counts_and_who_was_left_out_is_told() -> None:
    there, back = {"latency": 1e-4, "bandwidth": 1e9}, {"latency": 2e-4, "bandwidth": 5e8}
    common = {"left_out": [2], "all_reduce": 4e8, "flops": 1e11}
    measured = measured_of(
        {
            0: {**common, "links": {"1": there}, "unreached": [2]},
            1: {**common, "links": {"0": back}, "unreached": [2]},
            2: {**common, "links": {}, "unreached": [0], "all_reduce": 0.0},
        },
        {3: "the measuring process was killed by SIGKILL"},
    )
    assert measured.links == (Link(0, 1, 2e-4, 5e8),)
    assert measured.all_reduce == 4e8
    assert measured.failed == {
        2: "no connection to it from nodes 0, 1 and from it to node 0",
        3: "the measuring process was killed by SIGKILL",
    }


@pytest.mark.parametrize("world", range(1, 12))
def test_every_pair_meets_once_and_both_at_the_same_time(world: int) -> None:
    seats = [list(rounds(rank, world)) for rank in range(world)]
    met = [(rank, other) for rank, others in enumerate(seats) for other in others if other is not None]
    assert sorted(met) == sorted(itertools.permutations(range(world), 2))
    for turn in zip(*seats, strict=True):
        assert all(turn[other] == rank for rank, other in enumerate(turn) if other is not None)


def test_the_fewest_are_left_out() -> None:
    assert sound_of({0: [], 1: [], 2: []}) == [0, 1, 2]
    assert sound_of({0: [2], 1: [2], 2: []}) == [0, 1]
    assert sound_of({0: [], 1: [], 2: [0, 1], 3: []}) == [0, 1, 3]
    assert sound_of({0: [1], 1: [], 2: []}) == [0, 2]
    assert sound_of({0: [0]}) == [0]


def test_what_nvidia_smi_says() -> None:
    text = "0, NVIDIA H100 80GB HBM3, 81559, 4, 41, 0\n1, Tesla T4, 15360, 3, 50, [N/A]\n"
    assert parse_smi(text) == (GPU, Gpu(1, "Tesla T4", 15360.0, 3.0, 50.0, None))
    with pytest.raises(ValueError, match="Unable"):
        parse_smi("Unable to determine the device handle for GPU0000:01:00.0: Unknown Error\n")
