"""Where samples come from: a built-in data set, files of many formats, or the user's own data set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from ..core.contracts import KeyedSource, Source
from ..core.errors import JobError, Problem
from ..core.formats import is_object, is_url, no_such_source
from ..core.importing import load_object
from ..core.job import DataSpec
from . import array_files, tables, tokens
from .arrays import ArraySource
from .builtin import BUILT_IN, open_builtin
from .files import SOURCE, Files, locate, tell_format, wrong
from .idx import read_idx
from .images import read_images

_READERS: Mapping[str, Callable[[Files, DataSpec], Source]] = {
    "csv": tables.read_csv,
    "idx": read_idx,
    "images": read_images,
    "jsonl": tokens.read_jsonl,
    "npy": array_files.read_npy,
    "npz": array_files.read_npz,
    "parquet": tables.read_parquet,
    "safetensors": array_files.read_safetensors,
    "text": tokens.read_text,
    "tokens": tokens.read_tokens,
    "tsv": tables.read_tsv,
}


class DatasetSource:
    """A map-style torch data set: ``__len__`` with ``__getitem__`` or ``__getitems__``.

    Samples are put together by torch's ``default_collate``; pairs become 'x' and 'y', a lone tensor becomes 'x'. A data
    set with ``sample_keys`` is split by them (see :class:`~.core.contracts.KeyedSource`).
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        if callable(getattr(dataset, "sample_keys", None)):
            self.sample_keys: Callable[[np.ndarray], np.ndarray] = dataset.sample_keys

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
        raise wrong("a sample is neither a tensor, nor a pair (x, y), nor a dict of tensors", "return a dict")
    for key, value in collated.items():
        if not isinstance(value, Tensor):
            raise wrong(f"a sample's '{key}' does not collate to a tensor", "return tensors, arrays or numbers")
    return dict(collated)


def open_source(spec: DataSpec) -> Source:
    """The samples that ``spec`` names.

    Raises:
        JobError: the source is unknown, missing, unreadable, or gives something that cannot be trained on.
    """
    if spec.source in BUILT_IN:
        return _as_source(open_builtin(spec))
    if is_object(spec.source):
        return _as_source(_call(load_object(spec.source, SOURCE), spec))
    if not is_url(spec.source) and not Path(spec.source).expanduser().exists():
        raise JobError(no_such_source(spec.source, BUILT_IN, SOURCE))
    files = locate(spec.source, spec.storage)
    return _READERS[tell_format(files, spec.format)](files, spec)


def _call(factory: Any, spec: DataSpec) -> Any:
    if not callable(factory):
        raise wrong(f"'{spec.source}' is a {type(factory).__name__}", "name a function that returns a data set")
    try:
        inspect.signature(factory).bind(**spec.options)
    except TypeError as error:
        raise JobError(Problem(f"'{spec.source}' does not take these options: {error}", "data.options")) from error
    except ValueError:  # a builtin without a signature: the call itself will tell
        pass
    try:
        return factory(**spec.options)
    except Exception as error:  # a user's function may raise anything
        raise wrong(f"'{spec.source}' failed: {_say(error)}") from error


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
        raise wrong(f"it gave a {type(made).__name__}, which cannot be read by index", hint)
    return _probed(source)


def _indexed(made: Any) -> bool:
    return hasattr(made, "__getitem__") or hasattr(made, "__getitems__")


def _probed(source: Source) -> Source:
    """Read one sample now: a data set that cannot give the first one is refused before anything starts."""
    try:
        if not len(source):
            raise wrong("it has no samples")
        first = np.zeros(1, dtype=np.int64)
        fields = source.fetch(first)
        keys = np.asarray(source.sample_keys(first)) if isinstance(source, KeyedSource) else first
    except JobError:
        raise
    except Exception as error:  # a user's data set may raise anything
        raise wrong(f"its first sample cannot be read: {_say(error)}") from error
    if not isinstance(fields, Mapping) or not fields:
        raise wrong(f"fetch() gave a {type(fields).__name__}", "return a dict with a tensor per key")
    for key, value in fields.items():
        if not isinstance(value, Tensor) or not value.ndim or len(value) != 1:
            raise wrong(f"fetch() of one index gave no tensor of one sample for '{key}'")
    if keys.shape != (1,) or keys.dtype.kind not in "iu":
        raise wrong(f"sample_keys() of one index gave {keys.dtype} {list(keys.shape)}", "return a uint64 per index")
    return source


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
