"""What there is to be had of memory, what a rank asked for in vain, and what of a job would ask for less."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .job import Job

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
#: torch's allocator of memory on the host, torch's of memory on a GPU, numpy.
_ASKED = re.compile(r"(?:tried to allocate|Unable to allocate) ([\d.]+) (bytes|[KMGT]iB)", re.IGNORECASE)
_RECENT = 5.0  # seconds before its exit is noticed in which a process was killed, with time to give back its memory
_UNLIMITED = 1 << 60  # the kernel's word for no limit is a number near 2**63


def asked(text: str) -> int | None:
    """How many bytes an allocator says, in an exception's text, that it was asked for."""
    match = _ASKED.search(text)
    return round(float(match[1]) * _UNITS[match[2]]) if match else None


def in_words(size: float) -> str:
    """``"512 bytes"``, ``"3.4 GiB"``."""
    unit = max((unit for unit, bytes_ in _UNITS.items() if bytes_ <= max(size, 1)), key=_UNITS.__getitem__)
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size / _UNITS[unit]:.1f} {unit}"


@dataclass(frozen=True)
class Room:
    """Memory as the kernel counts it, in bytes.

    Attributes:
        total: of the machine, or what the control group of this process may have, if that is less.
        free: of it.
        resident: what this process holds.
    """

    total: int
    free: int
    resident: int

    @classmethod
    def now(cls, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Room | None:
        """As it is now; None where the kernel does not say."""
        machine, own = _table(proc / "meminfo"), _table(proc / "self/status")
        if "MemTotal" not in machine:
            return None
        total, free = machine["MemTotal"], machine.get("MemAvailable", 0)
        for group in memory_groups(proc, groups):
            limit = _number(group, "memory.max", "memory.limit_in_bytes")
            used = _number(group, "memory.current", "memory.usage_in_bytes")
            if limit is not None and used is not None and limit < _UNLIMITED:
                total, free = min(total, limit), min(free, max(0, limit - used))
        return cls(total, free, own.get("VmRSS", 0))


def memory_groups(proc: Path, groups: Path) -> list[Path]:
    """The folders of the control groups that bound the memory of this process, from its own outwards."""
    found: list[Path] = []
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):  # of version 2, and of version 1
                root = groups / controllers
                own = root / path.lstrip("/")
                found += [group for group in (own, *own.parents) if group.is_relative_to(root) and group.is_dir()]
    return found


def kills(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """How many processes the kernel has killed for want of memory so far: in this one's control group, anywhere.

    A process counts in the group that it is in, whichever group's limit it was killed for: none of another container
    counts in the groups around this one.
    """
    files = ("memory.events.local", "memory.oom_control")
    events = [_counter(group / name, "oom_kill") for group in memory_groups(proc, groups) for name in files]
    return max(events, default=0), _counter(proc / "vmstat", "oom_kill")


class RecentKills:
    """What :func:`kills` counts in the last seconds: an older kill did not end a process that has only now ended."""

    def __init__(self, count: Callable[[], tuple[int, int]] = kills) -> None:
        self._count = count
        self._seen: deque[tuple[float, tuple[int, int]]] = deque()

    def look(self, now: float) -> None:
        """Count, about once a second; ``now`` by any clock that only runs forward."""
        if not self._seen or now - self._seen[-1][0] >= 1.0:
            self._seen.append((now, self._count()))
        while len(self._seen) > 1 and now - self._seen[1][0] >= _RECENT:
            self._seen.popleft()

    def since(self, began: tuple[int, int]) -> tuple[int, int]:
        """The recent ones after ``began`` was counted."""
        before = self._seen[0][1] if self._seen else began
        group, machine = (now - max(then) for now, *then in zip(self._count(), before, began, strict=True))
        return group, machine


def remedies(job: Job) -> list[str]:
    """What of ``job`` would let ranks hold less, the cheapest first."""
    train, parallel = job.train, job.parallel
    found: list[str] = []
    if train.microbatches == "auto" or train.microbatches < train.global_batch:
        now = train.microbatches
        found.append(f"more train.microbatches (now {now}): fewer samples pass through the model at once")
    if not train.recompute:
        found.append("train.recompute=true: activations are computed again instead of kept")
    if train.precision == "fp32":
        found.append("train.precision=bf16: activations of half the size")
    if parallel.strategy == "ddp":
        found.append("parallel.strategy=fsdp, or zero1 to zero3: ranks share out the optimizer's state and the weights")
    elif parallel.strategy in ("zero1", "zero2"):
        found.append("parallel.strategy=zero3: ranks share out the weights too")
    if job.data.prefetch or job.data.workers:
        found.append("less data.prefetch and data.workers, if it is the data that is large")
    found.append("fewer ranks on a node (resources.nproc_per_node), or more nodes")
    return found


def _table(path: Path) -> dict[str, int]:
    """The sizes of a file such as /proc/meminfo, in bytes."""
    found: dict[str, int] = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(":")
            if rest.endswith(" kB"):
                found[name] = int(rest.split()[0]) * 1024
    return found


def _number(folder: Path, *names: str) -> int | None:
    for name in names:
        with suppress(OSError, ValueError):  # 'max' is no number
            return int((folder / name).read_text())
    return None


def _counter(path: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == [name]:
                return int(words[1])
    return 0
