"""What a folder of checkpoints could do without: half-written ones, and old ones. For a person to call. No torch.

A run clears up after its own saves, see :mod:`.retention`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import JobError, Problem
from ..core.storage import Storage
from .locate import Place, reading, steps_of
from .manifest import MANIFEST, folder_name, folder_step
from .reader import open_manifest
from .retention import Best
from .verify import verify


@dataclass(frozen=True)
class Removal:
    """A ``step-*`` folder to be removed: its step, why, and the bytes of its files."""

    step: int
    why: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What :func:`carry_out` would remove, newest first, and sentences on what stays that one might miss."""

    removals: tuple[Removal, ...]
    notes: tuple[str, ...]


def plan(place: Place, *, keep: int | None, older_than: float, now: float) -> Plan:
    """Find what is no checkpoint, and the complete ones beyond the newest ``keep``; nothing is removed.

    The newest one of which every byte is right stays in any case. To find it, checkpoints are read from the newest on;
    where none is right no complete one goes.

    Args:
        keep: how many complete ones stay; None keeps all.
        older_than: seconds that have passed since a folder without a manifest changed; before, it may be a save in
            progress.
        now: Unix time in seconds.

    Raises:
        JobError: one checkpoint was named and not a folder of them, or it cannot be read.
    """
    if place.named is not None:
        raise JobError(
            Problem("this is one checkpoint", place.source, "name the run directory, or the folder it is in")
        )
    steps = steps_of(place)
    storage, notes = place.storage, list[str]()
    removals: list[Removal] = []
    with reading(place.source):
        for step in _surplus(storage, steps, keep, notes):
            removals.append(Removal(step, f"older than the newest {keep}", storage.usage(folder_name(step)).bytes))
        found = {step for name in storage.folders() if (step := folder_step(name)) is not None}
        for step in found - set(steps):
            size, changed = storage.usage(folder_name(step))
            if changed is None:
                notes.append(f"{folder_name(step)} is not complete, but its age is not known: it stays")
            elif now - changed < older_than:
                notes.append(f"{folder_name(step)} is not complete, but changed {now - changed:.0f} s ago: it stays")
            else:
                removals.append(Removal(step, "not complete, or set aside", size))
    return Plan(tuple(sorted(removals, key=lambda removal: -removal.step)), tuple(notes))


def carry_out(storage: Storage, plan: Plan) -> None:
    """Remove what ``plan`` names. A manifest goes first, so that what a killed removal leaves is no checkpoint.

    Raises:
        OSError: the storage failed.
    """
    for removal in plan.removals:
        folder = folder_name(removal.step)
        storage.remove(f"{folder}/{MANIFEST}")
        storage.remove_tree(folder)


def _surplus(storage: Storage, steps: list[int], keep: int | None, notes: list[str]) -> list[int]:
    """The complete checkpoints that may go; ``notes`` is told of those that turn out to be damaged."""
    if keep is None or len(steps) <= keep:
        return []
    for step in steps:
        if not _is_whole(storage, step):
            notes.append(f"{folder_name(step)} is damaged: 'dltrain checkpoint verify' says where")
            continue
        if step not in steps[:keep]:
            notes.append(f"{folder_name(step)} is the newest that is whole: it stays")
        best = _best(storage, step, steps)
        if best is not None and best not in steps[:keep]:
            notes.append(f"{folder_name(best)} is the best by the run's 'keep_best': it stays")
        return [other for other in steps[keep:] if other not in (step, best)]
    notes.append("no complete checkpoint is whole: all of them stay")
    return []


def _best(storage: Storage, newest: int, steps: list[int]) -> int | None:
    """The best of ``steps`` by what the job of the ``newest`` keeps; None where it keeps none."""
    spec = open_manifest(storage, newest).job.get("checkpoint")
    if not isinstance(spec, dict) or not isinstance(metric := spec.get("keep_best"), str):
        return None
    return Best(metric, "max" if spec.get("keep_best_goal") == "max" else "min").among(storage, steps)


def _is_whole(storage: Storage, step: int) -> bool:
    """Whether every byte is right, as far as this version can tell: one of a newer format counts as damaged."""
    try:
        return next(verify(storage, step), None) is None
    except JobError:
        return False
