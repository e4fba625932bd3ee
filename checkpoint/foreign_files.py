"""Files of ``torch.save``, without unpickling: tensors and plain containers are made, and nothing else."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from ..core.errors import JobError, Problem

_SHOWN = 5


def load_tensors(path: Path, source: str, stand_ins: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The dictionary that a file of ``torch.save`` holds, its tensors mapped into memory.

    Args:
        stand_ins: by the full name of a class that the file asks for, an inert one to put in its place.

    Raises:
        JobError: it is no such file, is damaged, or asks for anything else than tensors and plain containers.
    """
    allowed: list[Any] = [(stand_in, name) for name, stand_in in (stand_ins or {}).items()]
    try:
        with torch.serialization.safe_globals(allowed):
            # files of before torch 1.6 cannot be mapped
            found: object = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        names = _asked_for(path, stand_ins or {})
        what = f"{path.name} asks for {', '.join(names[:_SHOWN])}" if names else f"{path.name}: {_first(error)}"
        hint = "only tensors and plain containers are read: save the state_dict() alone"
        raise JobError(Problem(what, source, hint)) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise JobError(Problem(f"{path.name} is no whole file of torch.save: {_first(error)}", source)) from None
    if not isinstance(found, Mapping):
        raise JobError(Problem(f"{path.name} holds a {type(found).__name__}, no state dict", source))
    return dict(cast("Mapping[str, Any]", found))


def _asked_for(path: Path, allowed: Mapping[str, type]) -> list[str]:
    """What a file would import beside tensors, as far as that can be told."""
    try:
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(allowed))
    except (RuntimeError, ValueError, pickle.UnpicklingError):
        return []


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
