"""What joins the nodes, measured by one process a node: every pair's latency and bandwidth, the group's, and compute.

The pairs are met in rounds, as in a tournament (the circle method), so that all links are tried in n - 1 rounds and
nobody waits for a third. Everything goes through gloo, over the interface that ranks use.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # documented

_PINGS = 40
_FIRST = 1 << 20  # bytes
_LARGEST = 16 << 20
_TRIES = 12  # short messages, many times: one that other processes did not hold up is among them
_FEW_TRIES = 3
_LONG = 0.2  # seconds in which messages of a pair that are slow are enough
_ROUNDS = 4
_CONNECT = 3.0  # seconds
_BURST = 0.02  # seconds that a message may take before it is large enough


def measure(addresses: Sequence[str], *, timeout: float, pairings: int | None = None) -> dict[str, Any]:
    """Join the group that torchrun's environment describes, and measure. Called on every node.

    Nodes that not all others can connect to are left out of what follows, so that they hold up nobody.

    Args:
        addresses: of each node, by rank.
        timeout: seconds that the others are waited for, each time.
        pairings: how many others each node is measured against; None for all.

    Returns:
        ``unreached``: ranks that this one could not connect to; ``left_out``: ranks that were not measured.
        ``links``: by other rank, ``latency`` (seconds one way) and ``bandwidth`` (bytes per second from this node),
        each the best of several, as others use the cores. ``all_reduce``: bytes per second through each node's link, as
        NCCL's tests count it: 2 (n-1)/n of the size over the time. ``flops``: of a matrix product, the best of a while.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found: dict[str, Any] = {"rank": rank, "flops": speed(), "links": {}, "all_reduce": 0.0}
    limit = timedelta(seconds=timeout)
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    unreached = _reach(store, rank, addresses, timeout)
    found["unreached"], everyone = unreached[rank], [r for r in range(world) if r in unreached]
    sound = sound_of({r: {*unreached[r], *(set(range(world)) - set(everyone))} for r in everyone})
    found["left_out"] = [r for r in range(world) if r not in sound]
    if rank not in sound or len(sound) == 1:
        return found
    own = sound.index(rank)
    within = PrefixStore("sound", store)
    dist.init_process_group("gloo", store=within, rank=own, world_size=len(sound), timeout=limit)
    for other in islice(rounds(own, len(sound)), pairings):
        if other is not None:
            latency, bandwidth = _pair(other, first=own < other)
            found["links"][str(sound[other])] = {"latency": latency, "bandwidth": bandwidth}
    found["all_reduce"] = _all_reduce(len(sound))
    dist.barrier()
    return found


def _reach(store: Store, rank: int, addresses: Sequence[str], timeout: float) -> dict[int, list[int]]:
    """Connect to every other node; by rank that took part: the ranks that it could not connect to."""
    address, world = addresses[rank], len(addresses)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen(world)
        store.set(f"port/{rank}", str(listener.getsockname()[1]))
        missed: list[int] = []
        for other in range(world):
            port = _heard(store, f"port/{other}", timeout)
            try:
                if port is None:
                    raise OSError
                socket.create_connection((addresses[other], int(port)), timeout=_CONNECT).close()
            except OSError:
                missed.append(other)
        store.set(f"missed/{rank}", json.dumps(missed))
        said = {other: _heard(store, f"missed/{other}", timeout) for other in range(world)}
    return {other: json.loads(text) for other, text in said.items() if text is not None}


def _heard(store: Store, key: str, timeout: float) -> str | None:
    """What another rank has put there; None if it has not within ``timeout`` seconds."""
    try:
        store.wait([key], timedelta(seconds=timeout))
    except RuntimeError:  # torch's DistStoreError
        return None
    return store.get(key).decode()


def sound_of(unreached: Mapping[int, Collection[int]]) -> list[int]:
    """The ranks that all reach each other, after leaving out those with the most broken links, one by one."""
    left = set(unreached)

    def broken(rank: int) -> int:
        return sum(other in unreached[rank] or rank in unreached[other] for other in left if other != rank)

    while left and (worst := max(left, key=lambda rank: (broken(rank), rank))) is not None and broken(worst):
        left.remove(worst)
    return sorted(left)


def rounds(rank: int, world: int) -> Iterator[int | None]:
    """Whom ``rank`` meets in each round; None where it rests. Each pair meets once."""
    seats = world + world % 2
    for number in range(seats - 1):
        if rank == seats - 1:
            other = next(r for r in range(seats - 1) if 2 * r % (seats - 1) == number)
        else:
            other = (number - rank) % (seats - 1)
            other = seats - 1 if other == rank else other
        yield other if other < world else None


def speed(*, size: int = 192, seconds: float = 0.25) -> float:
    """Floating-point operations per second of a float32 matrix product on one core: the best of many.

    Each is over long before the kernel gives the core to another process, so that one of many has not been held up.
    """
    torch.set_num_threads(1)
    left, right = torch.rand(size, size), torch.rand(size, size)
    best, until = float("inf"), time.monotonic() + seconds
    while time.monotonic() < until:
        begin = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def _pair(other: int, *, first: bool) -> tuple[float, float]:
    """Latency and bandwidth to ``other``, which calls this at the same time."""
    ping = torch.zeros(1, dtype=torch.uint8)
    trips: list[float] = []
    for _ in range(_PINGS):
        begin = time.perf_counter()
        _swap(ping, other, first=first)
        trips.append(time.perf_counter() - begin)
    room = torch.ones(_LARGEST, dtype=torch.uint8)  # written to, so that no page is made while messages are timed
    size = _FIRST
    while (times := _stream(room[:size], other, first=first)) and max(times) < _BURST and size < _LARGEST:
        size *= 4
    best, spent = times[not first], 0.0
    for number in range(_TRIES):
        if number >= _FEW_TRIES and spent > _LONG:
            break
        times = _stream(room[:size], other, first=first)
        best, spent = min(best, times[not first]), spent + max(times)
    return min(trips) / 2, size / best


def _swap(message: torch.Tensor, other: int, *, first: bool) -> None:
    if first:
        dist.send(message, other)
        dist.recv(message, other)
    else:
        dist.recv(message, other)
        dist.send(message, other)


def _stream(load: torch.Tensor, other: int, *, first: bool) -> tuple[float, float]:
    """Seconds that the load takes from the first node to the second one until that says that it has it, and back.

    Both get both, so that they decide alike how to go on.
    """
    word, took = torch.zeros(1, dtype=torch.uint8), torch.zeros(2, dtype=torch.float64)
    for way, sends in enumerate((first, not first)):
        if sends:
            begin = time.perf_counter()
            dist.send(load, other)
            dist.recv(word, other)
            took[way] = time.perf_counter() - begin
            dist.send(took[way : way + 1], other)
        else:
            dist.recv(load, other)
            dist.send(word, other)
            dist.recv(took[way : way + 1], other)
    there, back = took.tolist()
    return there, back


def _all_reduce(world: int) -> float:
    size, best = _FIRST, float("inf")
    while True:
        data = torch.zeros(size // 4)
        for _ in range(_ROUNDS):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(data)
            best = min(best, time.perf_counter() - begin)
        longest = torch.tensor([best])
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        if longest.item() > _BURST or size >= _LARGEST:
            return 2 * (world - 1) / world * size / longest.item()
        size, best = size * 4, float("inf")
