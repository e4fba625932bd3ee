"""Where samples come from: a built-in data set, an ``.npz`` file, or the user's own data set."""

from __future__ import annotations

import inspect
import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from ..core.contracts import Source
from ..core.errors import JobError, Problem, did_you_mean
from ..core.importing import load_object
from ..core.job import DataSpec
from ..core.storage import Storage
from ..core.suggest import similar_files
from .builtin import BUILT_IN, open_builtin

_WHERE = "data.source"


class ArraySource:
    """Samples that lie in memory: one array per key, samples along axis 0.

    Raises:
        JobError: no array, no sample, unequal lengths, or a dtype that torch does not have.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray | Tensor]) -> None:
        self.arrays = {key: np.asarray(array, order="C") for key, array in arrays.items()}
        lengths = {key: len(array) if array.ndim else None for key, array in self.arrays.items()}
        if not lengths:
            raise _wrong("there is no array in it", "give one array per batch key, such as 'x' and 'y'")
        if len(set(lengths.values())) > 1 or None in lengths.values():
            shapes = ", ".join(f"'{key}' {list(array.shape)}" for key, array in self.arrays.items())
            raise _wrong(f"arrays differ in length: {shapes}", "axis 0 counts the samples")
        for key, array in self.arrays.items():
            try:
                torch.from_numpy(np.empty(0, dtype=array.dtype))
            except (TypeError, ValueError) as error:
                raise _wrong(f"array '{key}' has dtype {array.dtype}, which torch does not have") from error
        self._length = len(next(iter(self.arrays.values())))
        if not self._length:
            raise _wrong("it has no samples")

    def __len__(self) -> int:
        return self._length

    def fetch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return {key: torch.from_numpy(array.take(indices, axis=0)) for key, array in self.arrays.items()}


class DatasetSource:
    """A map-style torch data set: ``__len__`` with ``__getitem__`` or ``__getitems__``.

    Samples are put together by torch's ``default_collate``; pairs become 'x' and 'y', a lone tensor becomes 'x'.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, indices: np.ndarray) -> dict[str, Tensor]:
        wanted = indices.tolist()
        many = getattr(self.dataset, "__getitems__", None)
        samples = many(wanted) if many is not None else [self.dataset[i] for i in wanted]
        return _by_key(default_collate(samples))


def _by_key(collated: Any) -> dict[str, Tensor]:
    if isinstance(collated, Tensor):
        collated = {"x": collated}
    elif isinstance(collated, (list, tuple)) and len(collated) == 2:
        collated = dict(zip(("x", "y"), collated, strict=True))
    if not isinstance(collated, Mapping):
        raise _wrong("a sample is neither a tensor, nor a pair (x, y), nor a dict of tensors", "return a dict")
    for key, value in collated.items():
        if not isinstance(value, Tensor):
            raise _wrong(f"a sample's '{key}' does not collate to a tensor", "return tensors, arrays or numbers")
    return dict(collated)


def open_source(spec: DataSpec) -> Source:
    """The samples that ``spec`` names.

    Raises:
        JobError: the source is unknown, missing, unreadable, or gives something that cannot be trained on.
    """
    if spec.source in BUILT_IN:
        return _as_source(open_builtin(spec))
    if spec.source.endswith(".npz"):
        return _npz(spec)
    if ":" in spec.source and "://" not in spec.source:
        return _as_source(_call(load_object(spec.source, _WHERE), spec))
    hint = did_you_mean(spec.source, BUILT_IN)
    raise _wrong(f"no data source '{spec.source}'", f"{hint}; or the path of an .npz file, or 'module:function'")


def _refuse_options(spec: DataSpec) -> None:
    if spec.options:
        raise JobError(Problem(f"'{spec.source}' takes no options, not '{next(iter(spec.options))}'", "data.options"))


def _npz(spec: DataSpec) -> ArraySource:
    """All arrays of an ``.npz`` file, in memory; float64 becomes float32, torch's default."""
    try:
        with _open(spec) as file:
            stored = np.load(file, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise _wrong(f"'{spec.source}' holds one bare array", "write it with numpy.savez(path, x=..., y=...)")
            with stored:
                arrays = {key: stored[key] for key in stored.files}
    except FileNotFoundError as error:
        hint = "" if "://" in spec.source else similar_files(Path(spec.source), [".npz"])
        raise _wrong(f"no such file: '{spec.source}'", hint) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _wrong(f"'{spec.source}' cannot be read as .npz: {error}") from error
    return ArraySource({k: a.astype(np.float32) if a.dtype == np.float64 else a for k, a in arrays.items()})


def _open(spec: DataSpec) -> BinaryIO:
    if "://" not in spec.source:
        _refuse_options(spec)
        return Path(spec.source).open("rb")
    folder, _, name = spec.source.rpartition("/")
    storage = Storage(folder, spec.options, where=_WHERE)
    return io.BytesIO(storage.read_range(name, 0, storage.size(name)))


def _call(factory: Any, spec: DataSpec) -> Any:
    if not callable(factory):
        raise _wrong(f"'{spec.source}' is a {type(factory).__name__}", "name a function that returns a data set")
    try:
        inspect.signature(factory).bind(**spec.options)
    except TypeError as error:
        raise JobError(Problem(f"'{spec.source}' does not take these options: {error}", "data.options")) from error
    except ValueError:  # a builtin without a signature: the call itself will tell
        pass
    try:
        return factory(**spec.options)
    except Exception as error:  # a user's function may raise anything
        raise _wrong(f"'{spec.source}' failed: {_say(error)}") from error


def _as_source(made: Any) -> Source:
    if isinstance(made, Mapping):
        return ArraySource(made)
    sized = hasattr(made, "__len__")
    if sized and callable(getattr(made, "fetch", None)):
        source = cast(Source, made)
    elif sized and not isinstance(made, (str, bytes, IterableDataset)) and _indexed(made):
        source = DatasetSource(made)
    else:
        hint = "return a map-style data set (with __len__ and __getitem__), or a dict of arrays"
        raise _wrong(f"it gave a {type(made).__name__}, which cannot be read by index", hint)
    return _probed(source)


def _indexed(made: Any) -> bool:
    return hasattr(made, "__getitem__") or hasattr(made, "__getitems__")


def _probed(source: Source) -> Source:
    """Read one sample now: a data set that cannot give the first one is refused before anything starts."""
    try:
        if not len(source):
            raise _wrong("it has no samples")
        fields = source.fetch(np.zeros(1, dtype=np.int64))
    except JobError:
        raise
    except Exception as error:  # a user's data set may raise anything
        raise _wrong(f"its first sample cannot be read: {_say(error)}") from error
    if not isinstance(fields, Mapping) or not fields:
        raise _wrong(f"fetch() gave a {type(fields).__name__}", "return a dict with a tensor per key")
    for key, value in fields.items():
        if not isinstance(value, Tensor) or not value.ndim or len(value) != 1:
            raise _wrong(f"fetch() of one index gave no tensor of one sample for '{key}'")
    return source


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _wrong(what: str, hint: str = "") -> JobError:
    return JobError(Problem(what, _WHERE, hint))
