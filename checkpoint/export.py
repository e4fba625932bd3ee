"""A checkpoint's weights as one plain safetensors file. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..core.storage import Storage
from ..core.tensorfile import Item, header, order
from .manifest import Manifest
from .reader import read_arrays

_PREFIX = "model."
_AVERAGE = "ema."


def export_weights(storage: Storage, manifest: Manifest, path: Path) -> str:
    """Write the model's weights and buffers to ``path``, one tensor in memory at a time; averaged weights where kept.

    Names lose ``model.``, and the part's name too where there is only one part, so that the part's
    ``load_state_dict`` takes what ``safetensors.torch.load_file(path)`` gives. The file appears when it is complete.

    Returns:
        the file's sha256.

    Raises:
        CorruptCheckpoint: a piece is missing or not the one that was written.
        ValueError: the checkpoint holds no weights.
    """
    names = _exported_names(manifest)
    if not names:
        raise ValueError(f"the checkpoint of step {manifest.step} holds no tensor under '{_PREFIX}'")
    items = {Item(name, manifest.tensors[fqn].dtype, manifest.tensors[fqn].shape): fqn for fqn, name in names.items()}
    ordered = sorted(items, key=order)
    digest = hashlib.sha256()

    def chunks() -> Iterator[bytes | memoryview]:
        yield header(ordered)
        for item in ordered:
            fqn = items[item]
            whole = {fqn: ((0,) * len(item.shape), item.shape)}
            yield read_arrays(storage, manifest, whole)[fqn].reshape(-1).view(np.uint8).data

    def hashed() -> Iterator[bytes | memoryview]:
        for chunk in chunks():
            digest.update(chunk)
            yield chunk

    target = path.absolute()
    Storage(str(target.parent), where=str(path)).write(target.name, hashed())
    return digest.hexdigest()


def _exported_names(manifest: Manifest) -> dict[str, str]:
    """By fully qualified name, the name in the exported file."""
    names = {fqn: fqn.removeprefix(_PREFIX) for fqn in manifest.tensors if fqn.startswith(_PREFIX)}
    parts = {name.partition(".")[0] for name in names.values()}
    if len(parts) == 1 and all("." in name for name in names.values()):
        names = {fqn: name.partition(".")[2] for fqn, name in names.items()}
    averaged = {fqn: _AVERAGE + fqn.removeprefix(_PREFIX) for fqn in names}
    return {averaged[fqn] if averaged[fqn] in manifest.tensors else fqn: name for fqn, name in names.items()}
