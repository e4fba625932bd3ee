"""What a machine says of its own state: memory, disks, limits, GPUs, clock. No torch."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import JobError
from ..core.storage import Storage

_SMI = ("index", "name", "memory.total", "memory.used", "temperature.gpu", "ecc.errors.uncorrected.volatile.total")
_SMI_TIME = 10.0


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi tells; memory in MiB, None where it does not say."""

    index: int
    name: str
    memory: float | None
    used: float | None
    temperature: float | None
    ecc_errors: float | None


@dataclass(frozen=True)
class Vitals:
    """The state of one machine.

    Attributes:
        at: Unix time by its clock when it was asked.
        memory: bytes that processes can still take.
        disks: free bytes by folder: of temporary files, and of the runs where it sees them.
        shm: free bytes of /dev/shm.
        files: how many files a process may open.
        gpus: its GPUs.
        trouble: what could not be found out, or does not work, in a few words each.
        storage: seconds that writing and reading back a small file took; None where it was not tried.
    """

    at: float
    memory: int
    disks: dict[str, int]
    shm: int
    files: int
    gpus: tuple[Gpu, ...]
    trouble: tuple[str, ...] = ()
    storage: float | None = None


def examine(*, folder: str, url: str, options: dict[str, object]) -> Vitals:
    """Look at this machine.

    Args:
        folder: parent of the runs.
        url: where checkpoints go; empty where that is not to be tried.
        options: storage options for it.
    """
    trouble: list[str] = []
    gpus = _gpus(trouble)
    disks = {path: shutil.disk_usage(path).free for path in (tempfile.gettempdir(), folder) if Path(path).is_dir()}
    storage = _try_storage(url, options, trouble) if url else None
    shm = Path("/dev/shm")  # noqa: S108  # it is looked at, not written to
    return Vitals(
        at=time.time(),
        memory=available_memory(),
        disks=disks,
        shm=shutil.disk_usage(shm).free if shm.is_dir() else 0,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpus=gpus,
        trouble=tuple(trouble),
        storage=storage,
    )


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that processes here can still take: the kernel's estimate, or less where the control group has a limit."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no such group, or "max": no limit
        pass
    return free


def _try_storage(url: str, options: dict[str, object], trouble: list[str]) -> float | None:
    begin = time.monotonic()
    try:
        Storage(url, options, timeout=10.0).check_writable()
    except (JobError, OSError) as error:
        trouble.append(str(error))
        return None
    return time.monotonic() - begin


def _gpus(trouble: list[str]) -> tuple[Gpu, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        if any(Path("/proc/driver/nvidia/gpus").glob("*")):
            trouble.append("it has NVIDIA GPUs but no nvidia-smi to ask about them")
        return ()
    command = [program, f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_TIME, check=True, env=os.environ)
        return parse_smi(done.stdout)
    except subprocess.TimeoutExpired:
        trouble.append(f"nvidia-smi did not answer within {_SMI_TIME:g} s: a GPU or its driver hangs")
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        said = getattr(error, "stdout", "") or str(error)
        trouble.append(f"nvidia-smi failed: {said.strip()}")
    return ()


def parse_smi(text: str) -> tuple[Gpu, ...]:
    """The GPUs in nvidia-smi's answer.

    Raises:
        ValueError: it is no such answer.
    """
    found: list[Gpu] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        words = [word.strip() for word in line.split(",")]
        if len(words) != len(_SMI):
            raise ValueError(line)
        index, name, *numbers = words
        found.append(Gpu(int(index), name, *map(_number, numbers)))
    return tuple(found)


def _number(word: str) -> float | None:
    """nvidia-smi says '[N/A]' or '[Not Supported]' of what a GPU does not have."""
    try:
        return float(word)
    except ValueError:
        return None
