"""Which checkpoints stay. One process of a run calls these, between its saves. No torch."""

from __future__ import annotations

from ..core.storage import Storage
from .manifest import MANIFEST, folder_name, folder_step
from .reader import catalogue

_ASIDE = "set-aside.json"


def prune(storage: Storage, keep: int) -> list[int]:
    """Remove all but the newest ``keep`` complete checkpoints, and what older saves left half-written.

    A manifest goes before its shards, so that what a killed removal leaves is no checkpoint. Half-written folders
    newer than the newest complete one may be a save in progress, and stay.

    Returns:
        the steps of the folders that were removed, newest first.
    """
    if keep < 1:
        raise ValueError(f"at least one checkpoint is kept, not {keep}")
    complete = [entry.step for entry in catalogue(storage)]
    if not complete:
        return []
    kept = set(complete[:keep])
    steps = {step for name in storage.folders() if (step := folder_step(name)) is not None}
    stale = sorted((step for step in steps | set(complete) if step < complete[0] and step not in kept), reverse=True)
    for step in stale:
        storage.remove(f"{folder_name(step)}/{MANIFEST}")
        storage.remove_tree(folder_name(step))
    return stale


def set_aside(storage: Storage, *, after: int) -> list[int]:
    """Take every checkpoint newer than step ``after`` out of the catalogue, since the run goes on from ``after``.

    They proved corrupt, or belong to a history that was left. If they stayed, they would be "the newest" again, and
    :func:`prune` would prefer them to what is saved next. Nothing is deleted: the manifest is renamed, and
    :func:`prune` removes the folder once a newer checkpoint is complete.

    Returns:
        the steps that were set aside, newest first.
    """
    steps = [entry.step for entry in catalogue(storage) if entry.step > after]
    for step in steps:
        name = f"{folder_name(step)}/{MANIFEST}"
        storage.write(f"{folder_name(step)}/{_ASIDE}", [storage.read(name)])
        storage.remove(name)
    return steps
