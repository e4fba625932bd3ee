"""What a storage does with files, and doing it on the local filesystem by plain system calls."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

Chunk = bytes | bytearray | memoryview

# Bytes that are written by one call, and after which the disk is told to begin. ext4 gives a call of several megabytes
# pages that large, and a page that is written to while the disk has it costs all of it again: with calls of 4 MB and a
# word to the disk every 8 MB, writing took three times the processor time.
_WRITE, _BEGIN = 1 << 20, 32 << 20
_SYNC_FILE_RANGE_WRITE = 2

PARTIAL = ".partial"
"""Ending of files that are still being written."""


class Usage(NamedTuple):
    """What a folder takes: the bytes of its files, and the Unix time at which one was last written.

    The time is None where there is no file, or the filesystem does not tell.
    """

    bytes: int
    changed: float | None


class Folder(ABC):
    """A folder on one kind of filesystem; the methods are :class:`~.storage.Storage`'s, with names already checked.

    Attributes:
        shown: its absolute path or URL, fit to be shown.
    """

    shown: str

    @abstractmethod
    def write(self, name: str, chunks: Iterable[Chunk]) -> None: ...

    @abstractmethod
    def create(self, name: str, chunks: Iterable[Chunk]) -> bool: ...

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def fill(self, name: str, begin: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]: ...

    @abstractmethod
    def size(self, name: str) -> int: ...

    @abstractmethod
    def names(self, folder: str) -> list[str]: ...

    @abstractmethod
    def folders(self) -> list[str]: ...

    @abstractmethod
    def usage(self, folder: str) -> Usage: ...

    @abstractmethod
    def remove(self, name: str) -> None: ...

    @abstractmethod
    def remove_tree(self, name: str) -> None: ...

    @abstractmethod
    def hint(self, error: OSError) -> str:
        """What a user could do about ``error``."""


class LocalFolder(Folder):
    """A folder of this machine (or one that is mounted)."""

    def __init__(self, path: str) -> None:
        self._root = Path(path).expanduser().absolute()
        self.shown = str(self._root)

    def write(self, name: str, chunks: Iterable[Chunk]) -> None:
        self._write(self._root / name, chunks, put=Path.replace)

    def create(self, name: str, chunks: Iterable[Chunk]) -> bool:
        def put(partial: Path, path: Path) -> None:
            os.link(partial, path)  # atomic on network file systems too
            partial.unlink()

        self._write(self._root / name, chunks, put=put)
        return True

    @staticmethod
    def _write(path: Path, chunks: Iterable[Chunk], *, put: Callable[[Path, Path], object]) -> None:
        _make_durable_folder(path.parent)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}{PARTIAL}")
        try:
            with partial.open("xb") as file:
                _write_through(file, chunks)
            put(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def fill(self, name: str, begin: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        path = self._root / name
        with path.open("rb", buffering=0) as file:
            for buffer in buffers:
                left = buffer
                while left:
                    count = os.preadv(file.fileno(), [left], begin)
                    if not count:
                        raise ends_early(begin + len(left), str(path))
                    begin, left = begin + count, left[count:]
                yield buffer

    def size(self, name: str) -> int:
        path = self._root / name
        if path.is_dir():
            raise is_a_folder(str(path))
        return path.stat().st_size

    def names(self, folder: str) -> list[str]:
        found = (Path(base) / file for base, _, files in os.walk(self._root / folder) for file in files)
        return [path.relative_to(self._root).as_posix() for path in found]

    def folders(self) -> list[str]:
        try:
            with os.scandir(self._root) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except FileNotFoundError:
            return []

    def usage(self, folder: str) -> Usage:
        total, times = 0, list[float]()
        for base, _, files in os.walk(self._root / folder):
            for path in (Path(base), *(Path(base, file) for file in files)):
                with contextlib.suppress(FileNotFoundError):  # a writer has renamed or removed it
                    found = path.stat()
                    total += 0 if path == Path(base) else found.st_size
                    times.append(found.st_mtime)
        return Usage(total, max(times, default=None))

    def remove(self, name: str) -> None:
        path = self._root / name
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            _sync_folder(path.parent)

    def remove_tree(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._root / name)

    def hint(self, error: OSError) -> str:
        return "name another folder, or free some space" if error.errno == errno.ENOSPC else "name another folder"


def ends_early(end: int, path: str) -> OSError:
    return OSError(errno.EIO, f"the file ends before byte {end}", path)


def is_a_folder(path: str) -> OSError:
    return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def _write_through(file: BinaryIO, chunks: Iterable[Chunk]) -> None:
    """Write all and make it durable. The disk begins early: the one wait, at the end, is for the last blocks."""
    begun = done = 0
    for chunk in chunks:
        view = memoryview(chunk)
        for begin in range(0, view.nbytes, _WRITE):
            done += file.write(view.cast("B")[begin : begin + _WRITE])
            if done - begun >= _BEGIN:
                file.flush()
                _begin_writing(file.fileno(), begun, done - begun)
                begun = done
    file.flush()
    os.fsync(file.fileno())


def _begin_writing(fd: int, begin: int, count: int) -> None:
    """Have the kernel write these bytes of a file to the disk, without waiting. What fails shows in fsync."""
    call = ctypes.CDLL(None).sync_file_range
    call(fd, ctypes.c_int64(begin), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


def _make_durable_folder(folder: Path) -> None:
    missing: list[Path] = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    """Make new, renamed and removed entries of ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some FUSE filesystems cannot, and need not
            raise
    finally:
        os.close(fd)
