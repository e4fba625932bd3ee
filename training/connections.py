"""Exceptions that tell of another rank: a connection to it broke."""

from __future__ import annotations

import re

import torch.distributed as dist

_LIBRARY = re.compile(r"gloo|nccl", re.IGNORECASE)
_BROKEN = re.compile(
    r"closed by (remote )?peer|likely closed|reset by peer|broken pipe|connection refused|no route to host|"
    r"network is unreachable|ncclRemoteError",
    re.IGNORECASE,
)


def is_broken_connection(error: BaseException) -> bool:
    """Whether a collective or the rendezvous failed because what it was connected to is gone.

    A collective that only took too long is none: ranks that wait for each other for ever are the program's doing.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not _BROKEN.search(text):
        return False
    return isinstance(error, dist.DistError) or _LIBRARY.search(text) is not None
