"""From what was measured on the nodes and between them to what is wrong, and whose it is. Pure functions.

A node or link is called slow only beside its like: a node's link is judged by the median over its pairs, against the
pairs that it has no part in. So one slow node is named itself, not everybody's link to it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .messages import NodeInfo
from .vitals import Vitals

_SLOW = 0.4  # of the others' bandwidth or speed: noise on a busy machine stays above
_LATE = 5.0  # times the others' latency, and at least this much more:
_LATE_BY = 5e-4  # seconds
_SKEW = 2.0  # seconds between clocks
_GIB = 1 << 30
_MEMORY, _DISK, _SHM, _FILES = 1 * _GIB, 2 * _GIB, 64 << 20, 1024
_HOT = 90.0  # °C: GPUs throttle soon after


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth a look.

    Attributes:
        sick: training there would fail or be slow; else only said.
        nodes: whose it is; two for a link between them.
    """

    sick: bool
    nodes: tuple[int, ...]
    what: str
    hint: str = ""


@dataclass(frozen=True)
class Link:
    """A pair of nodes: seconds one way, and bytes per second in the slower direction."""

    one: int
    other: int
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Measured:
    """What was found between the nodes.

    Attributes:
        all_reduce: bytes per second through each node's link while all reduce together; 0 where there is one node.
        flops: of each node, by number.
        failed: nodes that could not be measured, and why.
    """

    links: tuple[Link, ...] = ()
    all_reduce: float = 0.0
    flops: Mapping[int, float] = field(default_factory=dict[int, float])
    failed: Mapping[int, str] = field(default_factory=dict[int, str])

    def or_better(self, again: Measured) -> Measured:
        """The better figure of each kind of two measurements: what else a machine does only makes them worse.

        A node that was measured once can be measured.
        """
        links = {(link.one, link.other): link for link in self.links}
        for new in again.links:
            old = links.get((new.one, new.other), new)
            latency, bandwidth = min(old.latency, new.latency), max(old.bandwidth, new.bandwidth)
            links[new.one, new.other] = Link(new.one, new.other, latency, bandwidth)
        flops = {
            node: max(self.flops.get(node, 0.0), again.flops.get(node, 0.0)) for node in {**self.flops, **again.flops}
        }
        all_reduce = max(self.all_reduce, again.all_reduce)
        failed = {node: why for node, why in again.failed.items() if node in self.failed}
        return Measured(tuple(links.values()), all_reduce, flops, failed)


@dataclass(frozen=True)
class Asked:
    """A node's vitals, and by how many seconds its clock is ahead of the asking machine's, within ``within``."""

    vitals: Vitals
    ahead: float
    within: float


def diagnose(nodes: Sequence[NodeInfo], asked: Mapping[int, Asked], measured: Measured) -> list[Finding]:
    """Everything that is wrong, sick nodes first."""
    found = [*_versions(nodes), *_states(asked), *_clocks(asked)]
    found += [Finding(True, (node,), f"could not be measured: {why}") for node, why in measured.failed.items()]
    found += slower(nodes, measured)
    return sorted(found, key=lambda finding: (not finding.sick, finding.nodes))


def slower(nodes: Sequence[NodeInfo], measured: Measured) -> list[Finding]:
    """The nodes and links that did worse than the others."""
    machines = {node.node: node.ray_node for node in nodes}
    links = [link for link in measured.links if machines[link.one] != machines[link.other]]  # else it is no link
    return [*_slow_links(links), *_late_links(links), *_slow_nodes(machines, measured.flops)]


def _versions(nodes: Sequence[NodeInfo]) -> Iterator[Finding]:
    for name in sorted({name for node in nodes for name in node.versions}):
        versions = [node.versions.get(name, "none") for node in nodes]
        usual = statistics.mode(versions)
        for node, version in zip(nodes, versions, strict=True):
            if version != usual:
                what = f"{name} {version}, where others have {usual}"
                yield Finding(True, (node.node,), what, f"install {name} {usual} there")


def _states(asked: Mapping[int, Asked]) -> Iterator[Finding]:
    for node, found in asked.items():
        vitals, who = found.vitals, (node,)
        for what in vitals.trouble:
            yield Finding(True, who, what)
        if vitals.memory < _MEMORY:
            yield Finding(True, who, f"only {size(vitals.memory)} of memory are free", "end what takes it")
        for folder, free in vitals.disks.items():
            if free < _DISK:
                yield Finding(True, who, f"only {size(free)} are free in {folder}", "make room there")
        if vitals.shm < _SHM:
            what = f"only {size(vitals.shm)} are free in /dev/shm"
            yield Finding(True, who, what, "data loaders and NCCL share memory there (docker run --shm-size)")
        if vitals.files < _FILES:
            hint = "raise it: ulimit -n 65536"
            yield Finding(False, who, f"a process may open only {vitals.files} files", hint)
        for gpu in vitals.gpus:
            label = f"GPU {gpu.index} ({gpu.name})"
            if gpu.ecc_errors:
                what = f"{label} has had {gpu.ecc_errors:.0f} memory errors that could not be corrected"
                yield Finding(True, who, what, "reset it, or leave the node out")
            if gpu.temperature is not None and gpu.temperature >= _HOT:
                yield Finding(
                    True, who, f"{label} is at {gpu.temperature:.0f} °C, and will slow down", "look at its cooling"
                )
            if gpu.used is not None and gpu.memory and gpu.used > 0.1 * gpu.memory:
                what = f"{label}: {gpu.used:.0f} of {gpu.memory:.0f} MiB are taken already"
                yield Finding(False, who, what, "another process uses it: see nvidia-smi")


def _clocks(asked: Mapping[int, Asked]) -> Iterator[Finding]:
    if len(asked) < 2:
        return
    usual = statistics.median(found.ahead for found in asked.values())
    for node, found in asked.items():
        skew = found.ahead - usual
        if abs(skew) - found.within > _SKEW:
            what = f"its clock is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
            yield Finding(False, (node,), what, "let it follow a time server: logs and leases go by it")


def _slow_links(links: Sequence[Link]) -> Iterator[Finding]:
    def words(value: float, usual: float) -> str:
        return f"{rate(value)}, where others have {rate(usual)}"

    def slow(value: float, usual: float) -> bool:
        return value < _SLOW * usual

    yield from _outliers(links, lambda link: link.bandwidth, slow, words)


def _late_links(links: Sequence[Link]) -> Iterator[Finding]:
    def words(value: float, usual: float) -> str:
        return f"a latency of {1e3 * value:.2f} ms, where others have {1e3 * usual:.2f} ms"

    def late(value: float, usual: float) -> bool:
        return value > _LATE * usual and value - usual > _LATE_BY

    yield from _outliers(links, lambda link: link.latency, late, words)


def _outliers(
    links: Sequence[Link],
    figure: Callable[[Link], float],
    odd: Callable[[float, float], bool],
    words: Callable[[float, float], str],
) -> Iterator[Finding]:
    """Nodes whose links are odd as a whole, then single links between the others."""
    named: set[int] = set()
    for node in sorted({end for link in links for end in (link.one, link.other)}):
        own = [figure(link) for link in links if node in (link.one, link.other)]
        others = [figure(link) for link in links if node not in (link.one, link.other)]
        if others and odd(statistics.median(own), statistics.median(others)):
            named.add(node)
            yield Finding(
                True, (node,), f"its network link has {words(statistics.median(own), statistics.median(others))}"
            )
    left = [link for link in links if not named & {link.one, link.other}]
    for link in left:
        rest = [figure(other) for other in left if other is not link]
        if rest and odd(figure(link), statistics.median(rest)):
            yield Finding(
                True,
                (link.one, link.other),
                f"the link between them has {words(figure(link), statistics.median(rest))}",
            )


def _slow_nodes(machines: Mapping[int, str], flops: Mapping[int, float]) -> Iterator[Finding]:
    """Nodes that compute slower than the others. Logical nodes of one machine are the same cores."""
    for node, own in flops.items():
        others = [value for other, value in flops.items() if machines[other] != machines[node]]
        if others and own < _SLOW * statistics.median(others):
            what = f"computes {own / 1e9:.0f} GFLOP/s, where others do {statistics.median(others) / 1e9:.0f}"
            yield Finding(True, (node,), what, "throttled, or shared with something else?")


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / (1 << 20):.0f} MiB"


def rate(bandwidth: float) -> str:
    """Bytes per second, as network people say it."""
    bits = 8 * bandwidth
    return f"{bits / 1e9:.1f} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.0f} Mbit/s"
