"""A checkpoint from Python: a mapping of whole tensors, each read when it is asked for. No process group, no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from .locate import locate, open_chosen
from .manifest import Manifest
from .reader import read
from .weights import select

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.storage import Storage

#: What stands for an axis in an index, as numpy and torch take it.
Index = int | slice | EllipsisType


class Checkpoint(Mapping[str, "Tensor"]):
    """The tensors of a checkpoint by fully qualified name, such as ``model.cnn.hidden.weight``, on the CPU.

    Reading one raises KeyError for a name that is not there, and CorruptCheckpoint (a RunFailed) if a byte is not the
    one that was written. Nothing is kept: each access reads anew.

    Attributes:
        manifest: all that is known of the checkpoint.
    """

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage = storage
        self.manifest = manifest

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def job(self) -> dict[str, Any]:
        """The resolved job that wrote it."""
        return dict(self.manifest.job)

    def __getitem__(self, name: str) -> Tensor:
        return read(self._storage, self.manifest, {name: self._box(name, ())})[name]

    def __contains__(self, name: object) -> bool:
        return name in self.manifest.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.tensors)

    def __len__(self) -> int:
        return len(self.manifest.tensors)

    def __repr__(self) -> str:
        return f"<checkpoint of step {self.step} in {self._storage}: {len(self)} tensors>"

    def slice(self, name: str, *index: Index) -> Tensor:
        """A part of a tensor, as ``self[name][index]`` would be; only the pieces that it touches are read.

        ``ckpt.slice("model.net.embed.weight", slice(0, 100))`` gives the first 100 rows.

        Raises:
            KeyError: there is no tensor of that name.
            IndexError: the index does not fit its shape.
        """
        indices = _for_each_axis(index, self._shape(name))
        part = read(self._storage, self.manifest, {name: self._box(name, indices)})[name]
        return part[tuple(0 if isinstance(at, int) else slice(None, None, at.step) for at in indices)]

    def weights(self, part: str | None = None, *, ema: bool = False) -> dict[str, Tensor]:
        """The weights and buffers, all read, by the names that the part's ``load_state_dict`` takes.

        Args:
            part: which part of the recipe. By default all, with the part's name in front where there are several.
            ema: the averaged weights where there are such, instead of the trained ones.

        Raises:
            JobError: there is no such part, or there are no averages.
        """
        names = select(self.manifest, part=part, averaged=ema).tensors
        return {name: self[fqn] for name, fqn in names.items()}

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.manifest.tensors:
            raise KeyError(name)
        return self.manifest.tensors[name].shape

    def _box(self, name: str, indices: tuple[int | slice, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and extents of the box that an index reads; of the whole tensor for none."""
        bounds = [(0, size) for size in self._shape(name)]
        for axis, at in enumerate(indices):
            begin, end = (at, at + 1) if isinstance(at, int) else (at.start, max(at.start, at.stop))
            bounds[axis] = begin, end
        return tuple(begin for begin, _ in bounds), tuple(end - begin for begin, end in bounds)


def load_checkpoint(
    url: str | PathLike[str], step: int | None = None, *, options: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Open a checkpoint for reading; no tensor is read yet.

    Args:
        url: a run directory, a folder or fsspec URL of checkpoints, or one ``step-*`` folder.
        step: which one; the newest complete one by default.
        options: storage options of the fsspec filesystem, for a URL.

    Raises:
        JobError: there is no such checkpoint, or its manifest is not valid, or of a newer format.
    """
    place = locate(fspath(url), options)
    return Checkpoint(place.storage, open_chosen(place, step))


def _for_each_axis(index: tuple[Index, ...], shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """``index`` with one entry for each axis: a number from 0 on, or a slice with its three numbers."""
    count = sum(at is not ... for at in index)
    if count > len(shape) or len(index) - count > 1:
        raise IndexError(f"the index {index} does not fit the shape {list(shape)}")
    filler = (slice(None),) * (len(shape) - count)
    place = next((i for i, at in enumerate(index) if at is ...), len(index))
    full = (*index[:place], *filler, *index[place + 1 :])
    return tuple(_of_axis(at, size) for at, size in zip(full, shape, strict=True) if at is not ...)


def _of_axis(at: int | slice, size: int) -> int | slice:
    if isinstance(at, slice):
        start, stop, stride = at.indices(size)
        if stride < 1:
            raise IndexError("a slice goes forward only")
        return slice(start, stop, stride)
    if not -size <= at < size:
        raise IndexError(f"index {at} of an axis with {size} elements")
    return at % size
