"""Folders of images, a sub-folder per class, as torchvision's ``ImageFolder``; decoded as they are fetched."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..core.errors import did_you_mean
from ..core.formats import is_url
from ..core.job import DataSpec
from ..core.spec import Spec
from ..core.storage import Storage
from .files import OPTIONS, Files, read_options, wrong

if TYPE_CHECKING:
    from PIL.Image import Image

_PARTS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
_REQUESTS = 8  # images of a batch that are asked of a remote storage at once


class ImageOptions(Spec):
    size: int = Field(gt=0)
    """Height and width in pixels: the shorter side is scaled to it, then the middle is cut out."""
    channels: Literal[1, 3] = 3
    """3 for colour (RGB), 1 for grey."""
    classes: list[str] | None = Field(default=None, min_length=1)
    """The classes in their order, each a sub-folder; the default is all sub-folders, sorted."""


def read_images(files: Files, spec: DataSpec) -> ImageSource:
    """The images in the sub-folders of a folder; the name of the sub-folder is the class.

    Raises:
        JobError: it is no such folder, the options are wrong, or the first image cannot be decoded.
    """
    if not files.is_folder:
        hint = "a folder with a sub-folder of images per class"
        raise wrong(f"'{files.shown(files.names[0])}' is one file, not a folder of images", hint)
    names = files.of("images")
    found = sorted({name.partition("/")[0] for name in names if "/" in name})
    if lone := [name for name in names if "/" not in name]:
        hint = "every image lies in a sub-folder that is named like its class"
        raise wrong(f"'{files.shown(lone[0])}' belongs to no class", hint)
    if not names:
        raise wrong(f"'{files.url}' holds no images")
    if _PARTS.issuperset(found):
        hint = f"name one of them, such as '{files.url}/{found[0]}'; data.split makes the parts"
        raise wrong(f"'{files.url}' holds parts ({', '.join(found)}), not classes", hint)
    options = read_options(ImageOptions, spec.options)
    for name in options.classes or ():
        if name not in found:
            raise wrong(f"there is no folder '{name}'", did_you_mean(name, found), f"{OPTIONS}.classes")
    if options.classes:
        names = tuple(name for name in names if name.partition("/")[0] in options.classes)
    source = ImageSource(files, names, tuple(options.classes or found), spec=spec, options=options)
    with files.reading(names[0], "an image"):
        source.fetch(np.zeros(1, dtype=np.int64))
    return source


class ImageSource:
    """Images of one size: 'x' float32 ``[n, channels, size, size]`` in [0, 1], 'y' the class, int64 ``[n]``.

    Args:
        files: the folder.
        names: the images in it, relative, in their order.
        classes: names of the classes, in their order.
        spec: for the storage options: every process opens the storage for itself.
        options: size and channels.
    """

    def __init__(
        self, files: Files, names: tuple[str, ...], classes: tuple[str, ...], *, spec: DataSpec, options: ImageOptions
    ) -> None:
        places = {name: i for i, name in enumerate(classes)}
        self.classes = classes
        self._names = names
        self._labels = np.array([places[name.partition("/")[0]] for name in names], dtype=np.int64)
        self._url, self._spec, self._options = files.url, spec, options
        self._storage, self._pid = files.storage, os.getpid()

    def __len__(self) -> int:
        return len(self._names)

    def fetch(self, indices: np.ndarray) -> dict[str, Tensor]:
        names = [self._names[i] for i in indices.tolist()]
        options = self._options
        pixels = np.empty((len(names), options.size, options.size, options.channels), dtype=np.uint8)
        for i, (name, content) in enumerate(zip(names, self._read(names), strict=True)):
            try:
                pixels[i] = _decode(content, options).reshape(pixels.shape[1:])
            except Exception as error:  # Pillow raises whatever its plugins do
                raise ValueError(f"{self._url}/{name}: {error}") from error
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return {"x": x, "y": torch.from_numpy(self._labels[indices])}

    def sample_keys(self, indices: np.ndarray) -> np.ndarray:
        """A hash of each image's path in the folder, uint64 ``[n]``."""
        names = (self._names[i] for i in indices.tolist())
        digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
        return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)

    def _read(self, names: list[str]) -> Iterable[bytes]:
        if not is_url(self._url):
            return map(self._storage.read, names)
        if self._pid != os.getpid():  # a process that loads for the rank: clients do not survive a fork
            self._storage, self._pid = Storage(self._url, self._spec.storage), os.getpid()
        with ThreadPoolExecutor(_REQUESTS) as pool:
            return list(pool.map(self._storage.read, names))


def _decode(content: bytes, options: ImageOptions) -> np.ndarray:
    """uint8 ``[size, size]`` of grey, ``[size, size, 3]`` of colour."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as file:
        if file.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are not bytes (mode {file.mode})")
        upright = ImageOps.exif_transpose(file)
        image = _cut(upright.convert("RGB" if options.channels == 3 else "L"), options.size)
        return np.asarray(image)


def _cut(image: Image, size: int) -> Image:
    """The middle of the image, its shorter side scaled to ``size`` (bilinear, antialiased); as torchvision does it."""
    from PIL.Image import Resampling

    width, height = image.size
    short = min(width, height)
    if short != size:
        width, height = (size if side == short else int(size * side / short) for side in (width, height))
        image = image.resize((width, height), Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))
