"""A folder on any filesystem, in which a file is either there, complete and durable, or not there at all."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .errors import JobError, Problem
from .folders import PARTIAL, Chunk, Folder, LocalFolder, Usage


class Storage:
    """A folder, named by a path or a URL, in which files are written whole and read by byte ranges.

    File names are relative to it, with ``/`` between parts. Open it in the process that uses it: a remote client
    keeps a thread and sockets that do not survive a fork. Every operation raises OSError when the filesystem fails.

    Args:
        url: a local path (a relative one is made absolute here), or a URL of any protocol that fsspec knows.
        options: storage options of the fsspec filesystem; a local folder takes none.
        where: the job's key that named this folder, for messages.
        timeout: seconds that one remote request may take.

    Raises:
        JobError: unknown protocol, missing package, a password in the URL, or options that the client refuses.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] | None = None, *, where: str = "checkpoint.to", timeout: float = 60.0
    ) -> None:
        self._where = where
        protocol, separator, rest = url.partition("://")
        path = rest if separator else url
        if not path.strip():
            raise JobError(Problem(f"{url!r} names no folder", where))
        self._folder: Folder
        if separator and protocol not in ("file", "local"):
            from .remote import open_remote

            self._folder = open_remote(protocol, url, dict(options or {}), where=where, timeout=timeout)
        elif options:
            raise JobError(Problem(f"a local folder takes no options, not '{next(iter(options))}'", where))
        else:
            self._folder = LocalFolder(path)

    def __str__(self) -> str:
        """The absolute path or the URL, fit to be shown."""
        return self._folder.shown

    def write(self, name: str, chunks: Iterable[Chunk]) -> None:
        """Write a file, replacing one of that name. When this returns it is durable; before, it cannot be seen.

        ``chunks`` is consumed as it is written, so a generator keeps one chunk in memory. If it raises, or the
        process dies, the file stays what it was.
        """
        self._folder.write(_checked(name), chunks)

    def create(self, name: str, chunks: Iterable[Chunk]) -> bool:
        """Write a file that is not there yet; whether the filesystem vouches that nobody else has made it too.

        Raises:
            FileExistsError: it is there.
        """
        return self._folder.create(_checked(name), chunks)

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        return self._folder.read(_checked(name))

    def read_range(self, name: str, begin: int, end: int) -> bytearray:
        """Bytes ``[begin, end)`` of the file, exactly: a file that ends before ``end`` is an OSError."""
        if not 0 <= begin <= end:
            raise ValueError(f"[{begin}, {end}) is no range of bytes")
        data = bytearray(end - begin)
        self.read_into(name, begin, [memoryview(data)])
        return data

    def read_into(self, name: str, begin: int, buffers: Sequence[memoryview]) -> None:
        """The bytes of the file from ``begin`` on, into one buffer of bytes after the other, until all are full.

        Raises:
            OSError: the storage failed, or the file ends before that; what the buffers hold then is not said.
        """
        deque(self.fill(name, begin, buffers), maxlen=0)

    def fill(self, name: str, begin: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        """As :meth:`read_into`; gives each buffer when it is full, so that it can be looked at while it is in a cache.

        Raises:
            OSError: as :meth:`read_into`, while it is gone on with.
        """
        return self._folder.fill(_checked(name), begin, buffers)

    def size(self, name: str) -> int:
        """Length of the file in bytes. Raises FileNotFoundError."""
        return self._folder.size(_checked(name))

    def exists(self, name: str) -> bool:
        """Whether there is a (complete) file of this name."""
        try:
            self.size(name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        return True

    def names(self, folder: str = "") -> list[str]:
        """Every complete file in ``folder`` and below, sorted; of the whole storage by default."""
        found = self._folder.names(_checked(folder) if folder else "")
        return sorted(name for name in found if not name.endswith(PARTIAL))

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted."""
        return sorted(self._folder.folders())

    def usage(self, folder: str) -> Usage:
        """What ``folder`` takes, with files that are not complete."""
        return self._folder.usage(_checked(folder))

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""
        self._folder.remove(_checked(name))

    def remove_tree(self, name: str) -> None:
        """Remove a folder and all in it; one that is not there is no error."""
        self._folder.remove_tree(_checked(name))

    def check_writable(self) -> None:
        """Write, read and remove a small file.

        Raises:
            JobError: that does not work, and why.
        """
        probe = f"write-check-{secrets.token_hex(6)}"
        try:
            self.write(probe, [b"dltrain"])
            self.read(probe)
            self.remove(probe)
        except OSError as error:
            what = f"cannot write to {self}: {error.strerror or error}"
            raise JobError(Problem(what, self._where, self._folder.hint(error))) from error


def _checked(name: str) -> str:
    """``name``, if it stays inside the folder."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name or "\\" in name:
        raise ValueError(f"{name!r} is no name inside a folder: relative, '/' between parts, no '..'")
    return name
