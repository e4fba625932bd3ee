"""What a folder of checkpoints holds, as values to be shown. No torch, and no shard is opened."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any, cast

from ..core.errors import JobError, Problem, did_you_mean
from ..core.storage import Storage
from ..core.tensorfile import nbytes
from .locate import Place, reading, steps_of
from .manifest import CorruptCheckpoint, Manifest, TensorEntry, folder_name, folder_step
from .reader import open_manifest


@dataclass(frozen=True)
class Listed:
    """One ``step-*`` folder.

    Attributes:
        step: optimizer steps done.
        state: "complete", "incomplete" (no manifest), "corrupt" (its manifest is) or "newer" (of a later format).
        bytes: of the tensors, or of the files of one that is not complete.
        created: when it was completed; None of one that is not.
        written_by: strategy and ranks, such as "fsdp x tensor 2, 4 ranks".
        best: the best value so far of each metric that the run watches.
        why: what is wrong, in a sentence; empty where nothing is.
    """

    step: int
    state: str
    bytes: int
    created: datetime | None = None
    written_by: str = ""
    best: Mapping[str, float] | None = None
    why: str = ""


def listing(place: Place) -> list[Listed]:
    """Every checkpoint at ``place``, newest first, complete or not; only the one whose folder was named.

    Raises:
        JobError: the folder cannot be read.
    """
    complete = set(steps_of(place))
    with reading(place.source):
        found = {step for name in place.storage.folders() if (step := folder_step(name)) is not None}
        steps = sorted(found | complete, reverse=True)
        named = [step for step in steps if place.named in (None, step)]
        return [_listed(place.storage, step, complete=step in complete) for step in named]


def _listed(storage: Storage, step: int, *, complete: bool) -> Listed:
    if not complete:
        why = "no manifest: not completed, or set aside"
        return Listed(step, "incomplete", storage.usage(folder_name(step)).bytes, why=why)
    try:
        manifest = open_manifest(storage, step)
    except CorruptCheckpoint as error:
        return Listed(step, "corrupt", storage.usage(folder_name(step)).bytes, why=error.why)
    except JobError as error:
        return Listed(step, "newer", storage.usage(folder_name(step)).bytes, why=error.problems[0].what)
    size = tensor_bytes(manifest.tensors.values())
    return Listed(step, "complete", size, manifest.created, written_by(manifest), best_metrics(manifest))


def tensor_bytes(tensors: Iterable[TensorEntry]) -> int:
    """Bytes of the tensors' elements."""
    return sum(nbytes(entry.dtype, entry.shape) for entry in tensors)


def written_by(manifest: Manifest) -> str:
    """The strategy and the ranks that a checkpoint was written by, as its job says."""
    parallel = _mapping(manifest.job.get("parallel"))
    axes = [str(parallel.get("strategy", "?"))]
    axes += [f"{axis} {size}" for axis in ("tensor", "pipeline") if (size := parallel.get(axis, 1)) != 1]
    return f"{' x '.join(axes)}, {manifest.world} rank{'s' if manifest.world > 1 else ''}"


def best_metrics(manifest: Manifest) -> dict[str, float]:
    """The best value so far of each metric that the run watches for its schedule or for stopping early."""
    train = _mapping(manifest.job.get("train"))
    best: dict[str, float] = {}
    for where, watch in _mapping(_mapping(manifest.extra.get("course")).get("watches")).items():
        spec = _mapping(train.get(where.split(".")[1] if where.count(".") == 2 else where))
        value = _mapping(watch).get("best")
        if isinstance(value, int | float) and isinstance(spec.get("metric"), str):
            best[spec["metric"]] = value if spec.get("goal") == "min" else -value
    return best


def named_like(names: Iterable[str], patterns: Collection[str], source: str) -> list[str]:
    """The ``names`` that fit one of the shell-like ``patterns``; all where there are none.

    Raises:
        JobError: a pattern fits no name.
    """
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise JobError(Problem(f"no tensor is named like '{pattern}'", source, did_you_mean(pattern, known)))
    return [name for name in known if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]


def _mapping(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
