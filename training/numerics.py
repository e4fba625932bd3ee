"""What a rank's process must be like to compute the same bits as one of any other run."""

from __future__ import annotations

import os

import torch


def make_reproducible() -> None:
    """Have torch compute with one thread, and by deterministic algorithms only; before it uses a GPU.

    Operations that have no such algorithm raise RuntimeError, which names them.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it, and wants it for deterministic sums
    torch.set_num_threads(1)  # the parts that threads sum up are rounded one by one
    torch.use_deterministic_algorithms(True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  # it takes time; stubs lack it
    torch.backends.cudnn.benchmark = False  # it chooses algorithms by how fast they are
