"""A rank that runs out of memory: known by its exception, told with figures; and chosen before others by the kernel."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.job import Job
from ..core.memory import Room, asked, in_words, remedies

_FIRST_TO_GO = "1000"  # of -1000 to 1000, and what Ray gives its workers, the node agents among them


def go_first() -> None:
    """If memory runs out, have the kernel kill this process before the agent, the launcher, or whoever else is here."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)


@dataclass(frozen=True)
class OutOfMemory:
    """Words for a failure: ``what`` is the same whenever the same is asked for."""

    what: str
    hints: list[str]


def out_of_memory(error: BaseException, job: Job, device: torch.device) -> OutOfMemory | None:
    """What to say of ``error`` if it tells of memory that was not there; else None."""
    text = str(error)
    on_host = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text)
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    if not on_host and not on_gpu:
        return None
    size = asked(text)
    where = f" on {device}" if on_gpu else ""
    what = f"out of memory{where}: it asked for {in_words(size) if size is not None else 'more than there was'}"
    room = _on_gpu(device) if on_gpu else Room.now()
    there = [_told(room)] if room is not None else []
    return OutOfMemory(what, [*there, *(f"would help: {remedy}" for remedy in remedies(job))])


def _on_gpu(device: torch.device) -> Room:
    free, total = torch.cuda.mem_get_info(device)
    return Room(total, free, torch.cuda.memory_allocated(device))


def _told(room: Room) -> str:
    return f"there was: {in_words(room.free)} of {in_words(room.total)}; this rank held {in_words(room.resident)}"
