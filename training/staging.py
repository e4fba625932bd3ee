"""Memory that a rank's snapshots are copied into, and that another process can read when the rank is gone."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import torch

from ..checkpoint.writer import Planned
from ..core.contracts import ShardedState


class Stage:
    """Anonymous memory behind a descriptor: it has no name, so nothing can be left behind.

    It is used for one snapshot after the other: touching new pages costs more than copying into them.

    Attributes:
        fd: descriptor of the memory, to be passed on.
    """

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("dltrain-snapshot")
        self.size = max(size, 1)
        os.ftruncate(self.fd, self.size)
        self._memory = mmap.mmap(self.fd, self.size)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def fill(self, plan: Sequence[Planned], shards: ShardedState) -> None:
        """Copy the planned pieces here, one after the other, row-major."""
        begin = 0
        for key, _ in plan:
            boxes = shards[key.fqn].boxes()
            data = next(box for box in boxes if tuple(box.offset) == key.offset).data.detach()
            end = begin + key.nbytes
            if key.nbytes:
                self._bytes[begin:end].view(data.dtype).view(data.shape).copy_(data)
            begin = end

    def close(self) -> None:
        os.close(self.fd)


def image_size(plan: Sequence[Planned]) -> int:
    """Bytes that the planned pieces take."""
    return sum(planned.key.nbytes for planned in plan)
