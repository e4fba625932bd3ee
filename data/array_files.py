"""Arrays from ``.npz``, ``.npy`` and ``.safetensors`` files. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..core.errors import JobError, Problem, did_you_mean
from ..core.job import DataSpec
from ..core.schema import found
from .arrays import ArraySource, Convert
from .files import OPTIONS, Files, locate, tell_format, wrong


def read_npz(files: Files, spec: DataSpec) -> ArraySource:
    """All arrays of an ``.npz`` file, in memory; options choose some of them: batch key to name in the file.

    Raises:
        JobError: it cannot be read, holds an object array, or does not have an array that the options name.
    """
    name = files.one("npz")
    with files.reading(name, "npz"), files.open(name) as file:
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise wrong(f"'{files.shown(name)}' holds one bare array", "write it with numpy.savez(path, x=..., y=...)")
        with stored:
            arrays = {key: stored[inside] for key, inside in _chosen(spec, stored.files).items()}
    # converted at once, as they are read anyway; float32 is torch's default
    return ArraySource({k: a.astype(np.float32) if a.dtype == np.float64 else a for k, a in arrays.items()})


def read_npy(files: Files, spec: DataSpec) -> ArraySource:
    """The array of an ``.npy`` file as 'x'; options name the files of other keys. Mapped into memory, not read.

    Raises:
        JobError: a file cannot be read, holds an object array, or they differ in length.
    """
    paths = {key: path for key, path in _texts(spec).items() if key != "x"}
    arrays = {"x": _map_npy(files)}
    for key, path in paths.items():
        arrays[key] = _map_npy(locate(path, spec.storage, where=f"{OPTIONS}.{key}"))
    return ArraySource(arrays, convert=_to_single(arrays))


def _map_npy(files: Files) -> np.ndarray:
    tell_format(files, "npy")
    name = files.one("npy")
    with files.reading(name, "npy"), files.mappable(name) as path:
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise ValueError("it does not begin as one")  # numpy would take it for a pickle, and say that
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # an array of an odd byte order has no torch dtype; mapping it to the native one means reading it
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def read_safetensors(files: Files, spec: DataSpec) -> ArraySource:
    """The tensors of a ``.safetensors`` file, mapped into memory; options choose: batch key to name in the file.

    Raises:
        JobError: it cannot be read, or does not have a tensor that the options name.
    """
    from safetensors import SafetensorError, safe_open

    name = files.one("safetensors")
    with files.reading(name, "safetensors"), files.mappable(name) as path:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(inside) for key, inside in _chosen(spec, list(file.keys())).items()}
            arrays = {key: _as_numpy(tensor) for key, tensor in tensors.items()}
        except (SafetensorError, TypeError) as error:
            raise ValueError(error) from error
    return ArraySource(arrays, convert=_to_single(arrays))


def _as_numpy(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _to_single(arrays: Mapping[str, np.ndarray]) -> dict[str, Convert]:
    """float64 becomes float32, torch's default, as it is fetched."""
    return {key: Tensor.float for key, array in arrays.items() if array.dtype == np.float64}


def _chosen(spec: DataSpec, stored: list[str]) -> dict[str, str]:
    """Batch key to name in the file: what the options say, else all by their own names."""
    chosen = _texts(spec) or {name: name for name in stored}
    problems = [
        Problem(f"there is no array '{name}' in '{spec.source}'", f"{OPTIONS}.{key}", did_you_mean(name, stored))
        for key, name in chosen.items()
        if name not in stored
    ]
    if problems:
        raise JobError(*problems)
    return chosen


def _texts(spec: DataSpec) -> dict[str, str]:
    for key, value in spec.options.items():
        if not isinstance(value, str):
            raise wrong(f"expected the name of an array or file, found {found(value)}", where=f"{OPTIONS}.{key}")
    return dict(spec.options)
