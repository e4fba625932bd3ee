"""Filling a rank's shards from a checkpoint: all of them, or the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from ..checkpoint.image import Images
from ..checkpoint.manifest import Manifest
from ..checkpoint.reader import Files, Target, read_into
from ..checkpoint.reader import bits as pattern
from ..checkpoint.tensors import bits, code, from_array
from ..core.contracts import ShardedState
from ..core.errors import JobError, Problem

AFRESH = "'--resume never' starts afresh"

_SHOWN = 4

#: Copies a checkpoint's slices into shards.
Filler = Callable[[Files, Manifest, ShardedState], None]


def fill_all(storage: Files, manifest: Manifest, shards: ShardedState) -> None:
    """Copy the checkpoint's slices into ``shards``; only these are read.

    Loss scaling that the checkpoint does not know begins as it does in a new run, and so does the optimizer of a part
    of which scaling has skipped every step so far.

    Raises:
        JobError: the checkpoint has no tensor of a shard's name and whole shape.
        CorruptCheckpoint: a piece of it is damaged.
    """
    shards = {name: s for name, s in shards.items() if name in manifest.tensors or not name.startswith("scaling.")}
    fresh = {name: shards[name] for name in _not_begun(manifest, shards)}
    shards = {name: shard for name, shard in shards.items() if name not in fresh}
    for name, shard in shards.items():
        entry = manifest.tensors.get(name)
        if entry is None and name.startswith("optimizer."):
            what = f"the checkpoint of step {manifest.step} has no {name}"
            raise JobError(Problem(what, "train.optimizer", AFRESH))
        if entry is None or tuple(entry.shape) != shard.shape:
            found = f"shape {tuple(entry.shape)}" if entry else "nothing of that name"
            what = f"the checkpoint of step {manifest.step} holds {found} where the model has {name} {shard.shape}"
            raise JobError(Problem(what, "model", AFRESH))
    _copy(storage, manifest, {name: name for name in shards}, shards)
    with torch.no_grad():
        for shard in fresh.values():
            shard.data.zero_()


def fill_from_memory(images: Images, shards: ShardedState) -> None:
    """Copy the snapshot's slices into ``shards``. Of what this rank holds nothing of, its node need not know.

    Raises:
        CorruptCheckpoint: the images do not hold all of them; nothing was copied.
    """
    shards = {name: shard for name, shard in shards.items() if any(box.data.numel() for box in shard.boxes())}
    images.check_holds(
        {name: [(box.offset, tuple(box.data.shape)) for box in shard.boxes()] for name, shard in shards.items()}
    )
    fill_all(images, images.manifest, shards)


def _not_begun(manifest: Manifest, shards: ShardedState) -> list[str]:
    """The optimizers' tensors of parts that had not made a step that was not skipped."""
    begun = {name.split(".")[1] for name in manifest.tensors if name.startswith("optimizer.")}
    scaled = {name.split(".")[1] for name in manifest.tensors if name.startswith("scaling.")}
    return [name for name in shards if name.startswith("optimizer.") and name.split(".")[1] in scaled - begun]


def fill_weights(storage: Files, manifest: Manifest, shards: ShardedState, *, names: set[str]) -> None:
    """Copy the checkpoint's weights and buffers into the model's; averages begin at them, the optimizer at nothing.

    Args:
        names: the model's tensors on all ranks.

    Raises:
        JobError: the checkpoint's model and this one differ in names or shapes; it says in which.
        CorruptCheckpoint: a piece of it is damaged.
    """
    saved = {name for name in manifest.tensors if name.startswith("model.")}
    wrong = [f"it has no {name}" for name in sorted(names - saved)]
    wrong += [f"the model has no {name}" for name in sorted(saved - names)]
    sources = {name: name.replace("ema.", "model.", 1) for name in shards if name.startswith(("model.", "ema."))}
    for name, source in sorted(sources.items()):
        entry = manifest.tensors.get(source)
        if name == source and entry is not None and tuple(entry.shape) != shards[name].shape:
            wrong.append(f"{name} is {list(entry.shape)} there, {list(shards[name].shape)} here")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        what = f"the weights of step {manifest.step} do not fit the model: {'; '.join(wrong[:_SHOWN])}{more}"
        raise JobError(Problem(what, "--init-from", "the recipe and 'model' must be those that the weights are of"))
    _copy(storage, manifest, sources, shards)
    with torch.no_grad():
        for name, shard in shards.items():
            if name.startswith("optimizer."):
                shard.data.zero_()  # as they begin


def _copy(storage: Files, manifest: Manifest, sources: Mapping[str, str], shards: ShardedState) -> None:
    """Fill the shards named in ``sources`` with their slices of the tensor that each name stands for there.

    What is on the CPU is read straight into its memory. Tied weights are one memory with two names, which only one
    tensor may be read into: the other comes after it.
    """
    targets, later = dict[str, list[Target]](), list[tuple[torch.Tensor, np.ndarray, str]]()
    taken = set[int]()
    for name, source in sources.items():
        dtype = manifest.tensors[source].dtype
        for box in shards[name].boxes():
            same = code(box.data.dtype) == dtype and box.data.data_ptr() not in taken
            array = bits(box.data) if same else None
            if array is None:
                array = np.empty(tuple(box.data.shape), pattern(manifest, source))
                later.append((box.data, array, dtype))
            taken.add(box.data.data_ptr())
            targets.setdefault(source, []).append(Target(box.offset, array))
    read_into(storage, manifest, targets)
    with torch.no_grad():
        for data, array, dtype in later:
            data.copy_(from_array(array, dtype))
