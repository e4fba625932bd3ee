"""Ray as an untyped module: its annotations are partial, and half-known types tell a checker less than none."""

from __future__ import annotations

import importlib
from typing import Any


def ray() -> Any:
    """The module ``ray``, imported now (a quarter of a second)."""
    importlib.import_module("ray.exceptions")
    return importlib.import_module("ray")
