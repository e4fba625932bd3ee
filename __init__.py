"""dltrain: launch distributed PyTorch training on Ray, one command from the laptop to the cluster.

Public names load on first use (PEP 562), so that ``import dltrain`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.loaded import Checkpoint, load_checkpoint
    from .core.contracts import Batch, Layout, Recipe
    from .core.errors import Interrupted, JobError, RunFailed
    from .core.job import Job
    from .launcher.api import launch
    from .launcher.carry import RunResult
    from .launcher.session import Options
    from .training.context import Context, context

__version__ = "0.1.0"

_HOMES = {
    "Batch": ".core.contracts",
    "Checkpoint": ".checkpoint.loaded",
    "Context": ".training.context",
    "Interrupted": ".core.errors",
    "Job": ".core.job",
    "JobError": ".core.errors",
    "Layout": ".core.contracts",
    "Options": ".launcher.session",
    "Recipe": ".core.contracts",
    "RunFailed": ".core.errors",
    "RunResult": ".launcher.carry",
    "context": ".training.context",
    "launch": ".launcher.api",
    "load_checkpoint": ".checkpoint.loaded",
}

__all__ = [
    "Batch",
    "Checkpoint",
    "Context",
    "Interrupted",
    "Job",
    "JobError",
    "Layout",
    "Options",
    "Recipe",
    "RunFailed",
    "RunResult",
    "context",
    "launch",
    "load_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
