"""IDX files, the format of the MNIST family: http://yann.lecun.com/exdb/mnist, "the IDX file format"."""

from __future__ import annotations

import re
from typing import BinaryIO, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from ..core.job import DataSpec
from ..core.spec import Spec
from .arrays import ArraySource
from .files import OPTIONS, Files, locate, read_options, wrong

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IMAGES = re.compile(r"(?P<set>.*?)(?P<part>train|t10k|test)-images[-.]idx3-ubyte(?:\.gz)?")
_PARTS = {"train": ("train",), "test": ("t10k", "test"), "all": ("train", "t10k", "test")}


class IdxOptions(Spec):
    part: Literal["train", "test", "all"] = "train"
    """Of a folder: the files 'train-…' (60,000 of MNIST's images), the files 't10k-…', or both."""
    y: str | None = Field(default=None, min_length=1)
    """Of a file: path or URL of the labels; the default is the file of its name with 'labels-idx1' in it."""


def read_idx(files: Files, spec: DataSpec) -> ArraySource:
    """Images and labels of IDX files, plain or gzip, in memory.

    Grey images of bytes become float32 ``[n, 1, height, width]`` in [0, 1] as they are fetched; other arrays stay as
    they are. Labels are int64.

    Raises:
        JobError: a file is missing, truncated or no IDX file, or there are not as many labels as images.
    """
    options = read_options(IdxOptions, spec.options)
    if files.is_folder:
        names = _in_folder(files, options.part)
        pairs = [(_read(files, name), _read(files, _labels(name))) for name in names]
        x, y = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    else:
        x, y = _read(files, files.names[0]), _beside(files, options, spec)
    arrays = {"x": x} if y is None else {"x": x, "y": y.astype(np.int64) if y.dtype.kind in "iu" else y}
    return ArraySource(arrays, convert={"x": _grey} if x.dtype == np.uint8 and x.ndim == 3 else None)


def _grey(images: Tensor) -> Tensor:
    return images.unsqueeze(1).float().div_(255)


def _in_folder(files: Files, part: str) -> list[str]:
    """The files of images of a part, in a fixed order; a plain file goes before a packed one of that name."""
    found = {
        name.removesuffix(".gz"): (name, match)
        for name in sorted(files.names, reverse=True)
        if (match := _IMAGES.fullmatch(name)) and match["part"] in _PARTS[part]
    }
    if len({match["set"] for _, match in found.values()}) > 1:
        shown = ", ".join(sorted(name for name, _ in found.values()))
        raise wrong(f"'{files.url}' holds several sets of images: {shown}", "name one of the files as data.source")
    if not found:
        hint = "there should be 'train-images-idx3-ubyte' or 't10k-images-idx3-ubyte', plain or .gz"
        raise wrong(f"'{files.url}' has no IDX images of the part '{part}'", hint)
    by_part = sorted(found.values(), key=lambda one: _PARTS["all"].index(one[1]["part"]))
    return [name for name, _ in by_part]


def _labels(images: str) -> str:
    return images.replace("images", "labels").replace("idx3", "idx1")


def _beside(files: Files, options: IdxOptions, spec: DataSpec) -> np.ndarray | None:
    """The labels of the one file of images that was named; None where neither an option nor its name tells of any."""
    if options.y is not None:
        labels = locate(options.y, spec.storage, where=f"{OPTIONS}.y")
        return _read(labels, labels.one("idx"))
    name = files.names[0]
    return _read(files, _labels(name)) if _labels(name) != name else None


def _read(files: Files, name: str) -> np.ndarray:
    with files.reading(name, "idx"), files.open(name) as file:
        return _array(file)


def _array(file: BinaryIO) -> np.ndarray:
    magic = file.read(4)
    if len(magic) != 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES or not magic[3]:
        raise ValueError("it does not begin as one")
    dtype, axes = np.dtype(_DTYPES[magic[2]]), magic[3]
    sizes = file.read(4 * axes)
    if len(sizes) != 4 * axes:
        raise ValueError("it ends within its header")
    shape = tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))
    data, wanted = file.read(), dtype.itemsize * int(np.prod(shape, dtype=object))
    if len(data) != wanted:
        raise ValueError(f"its header tells of {wanted} bytes {list(shape)}, there are {len(data)}")
    return np.frombuffer(data, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
