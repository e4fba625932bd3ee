"""A folder behind a URL, through fsspec: every request has a deadline, every failure is an OSError.

fsspec and its clients have no type stubs, so they are Any here, loaded when the first URL is opened.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from .errors import JobError, Problem, did_you_mean
from .folders import PARTIAL, Chunk, Folder, Usage, ends_early, is_a_folder

T = TypeVar("T")

_BLOCK = 32 << 20  # bytes per request; S3 takes 10,000 parts, so files up to 320 GB
_COMMON = ("file", "s3", "gs", "az", "abfs", "hdfs", "sftp", "smb")
_EXTRAS = {"s3": "s3", "s3a": "s3"}  # protocol -> extra of this package that brings its client
# Stores where an object appears, whole, only when its upload is completed. Elsewhere a rename does that.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
_ERRNO: tuple[tuple[type[OSError], int], ...] = (
    (FileNotFoundError, errno.ENOENT),
    (PermissionError, errno.EACCES),
    (TimeoutError, errno.ETIMEDOUT),
    (FileExistsError, errno.EEXIST),
)


def open_remote(protocol: str, url: str, options: dict[str, Any], *, where: str, timeout: float) -> RemoteFolder:
    """The folder at ``url``. Nothing is asked of the store yet, except by clients that connect when they are made.

    Raises:
        JobError: unknown protocol, missing package, a password in the URL, or options that the client refuses.
    """
    shown = _without_password(url)
    if shown != url:
        what = f"{shown}: the URL holds a password, which a run would write into its files"
        raise JobError(Problem(what, where, "give credentials through the environment or the client's own files"))
    fsspec: Any = importlib.import_module("fsspec")
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise JobError(
            Problem(f"{shown}: unknown protocol '{protocol}'", where, did_you_mean(protocol, _COMMON))
        ) from None
    except ImportError as error:
        hint = f"pip install 'dltrain[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else str(error)
        raise JobError(Problem(f"{protocol}:// needs a package that is not installed", where, hint)) from None
    try:
        # A cached instance would be shared with a parent process, and carry its event loop over a fork.
        filesystem, root = _within(
            timeout, "connect", lambda: fsspec.core.url_to_fs(url, **options, skip_instance_cache=True)
        )
    except Exception as error:
        raise JobError(Problem(f"cannot open {shown}: {_reason(error)}", where)) from error
    return RemoteFolder(filesystem, root, shown.rstrip("/"), objects=protocol in _OBJECT_STORES, timeout=timeout)


class RemoteFolder(Folder):
    """A folder on an fsspec filesystem.

    Args:
        filesystem: the fsspec filesystem.
        root: the folder's path on it.
        shown: its URL, without credentials.
        objects: whether files appear only when complete, so that no rename is needed.
        timeout: seconds that one request may take.
    """

    def __init__(self, filesystem: Any, root: str, shown: str, *, objects: bool, timeout: float) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        self._objects = objects
        self._timeout = timeout
        self._pid = os.getpid()
        self.shown = shown

    def write(self, name: str, chunks: Iterable[Chunk]) -> None:
        final = self._path(name)
        target = final if self._objects else f"{final}.{secrets.token_hex(6)}{PARTIAL}"
        if not self._objects:
            self._call("mkdir", name, lambda: self._fs.makedirs(final.rpartition("/")[0], exist_ok=True))
        file = self._call("open", name, lambda: self._fs.open(target, "wb", block_size=_BLOCK))
        try:
            for block in _blocks(chunks):
                self._call("write", name, lambda block=block: file.write(block))
            self._call("complete", name, file.close)
            if not self._objects:
                self._call("rename", name, lambda: self._fs.mv(target, final))
        except BaseException:
            self._abandon(file, target)
            raise

    def create(self, name: str, chunks: Iterable[Chunk]) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self.size(name)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{self.shown}/{name}")
        self.write(name, chunks)
        return False

    def _abandon(self, file: Any, target: str) -> None:
        """Leave nothing of a failed upload. fsspec's files would commit what they have when closed or collected."""
        with contextlib.suppress(Exception):
            if self._objects:
                file.closed = True
                _within(self._timeout, "discard", file.discard)
            else:
                _within(self._timeout, "close", file.close)
                _within(self._timeout, "remove", lambda: self._fs.rm_file(target))

    def read(self, name: str) -> bytes:
        return self._call("read", name, lambda: self._fs.cat_file(self._path(name)))

    def fill(self, name: str, begin: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        path, left, end = self._path(name), deque(buffers), begin + sum(map(len, buffers))
        for start in range(begin, end, _BLOCK):
            stop = min(start + _BLOCK, end)
            block = self._call("read", name, lambda a=start, b=stop: self._fs.cat_file(path, start=a, end=b))
            if len(block) != stop - start:
                raise ends_early(end, f"{self.shown}/{name}")
            _deal(memoryview(block), left)
        yield from buffers

    def size(self, name: str) -> int:
        self._fs.invalidate_cache()
        info = self._call("look up", name, lambda: self._fs.info(self._path(name)))
        if info["type"] != "file":
            raise is_a_folder(f"{self.shown}/{name}")
        return int(info["size"])

    def names(self, folder: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found: list[str] = self._call("list", folder, lambda: self._fs.find(self._path(folder)))
        except FileNotFoundError:
            return []
        return [path.removeprefix(self._root).lstrip("/") for path in found]

    def folders(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found: list[dict[str, Any]] = self._call("list", "", lambda: self._fs.ls(self._root, detail=True))
        except FileNotFoundError:
            return []
        return [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory"]

    def usage(self, folder: str) -> Usage:
        names = self.names(folder)
        times = [self._modified(name) for name in names]
        changed = None if None in times else max((time for time in times if time is not None), default=None)
        return Usage(sum(self.size(name) for name in names), changed)

    def _modified(self, name: str) -> float | None:
        try:
            return self._call("look up", name, lambda: self._fs.modified(self._path(name)).timestamp())
        except OSError as error:
            if isinstance(error.__cause__, NotImplementedError):
                return None
            raise

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call("remove", name, lambda: self._fs.rm_file(self._path(name)))

    def remove_tree(self, name: str) -> None:
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._call("remove", name, lambda: self._fs.rm(self._path(name), recursive=True))

    def hint(self, error: OSError) -> str:
        if isinstance(error, FileNotFoundError):
            return "does the bucket or host exist, and is its name right?"
        if isinstance(error, TimeoutError):
            return "is the address right, and can this machine reach it?"
        return "check the credentials in the environment, and their rights"

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _call(self, what: str, name: str, call: Callable[[], T]) -> T:
        """``call``'s result within the deadline; whatever a client raises becomes an OSError that names the file."""
        if os.getpid() != self._pid:
            raise RuntimeError(f"{self.shown} was opened in another process: open it after the fork")
        try:
            return _within(self._timeout, what, call)
        except Exception as error:
            code = error.errno if isinstance(error, OSError) else None
            code = code or next((number for kind, number in _ERRNO if isinstance(error, kind)), errno.EIO)
            raise OSError(code, _reason(error), f"{self.shown}/{name}") from error


def _within(seconds: float, what: str, call: Callable[[], T]) -> T:
    """``call()`` in a daemon thread: one that is late is left behind, since no client promises to stop."""
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="dltrain-storage", daemon=True).start()
    if not wait([outcome], seconds).done:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer to '{what}' within {seconds:g} s")
    return outcome.result()


def _blocks(chunks: Iterable[Chunk]) -> Iterator[memoryview]:
    """``chunks`` in pieces that one request can carry."""
    for chunk in chunks:
        view = memoryview(chunk)
        for begin in range(0, view.nbytes, _BLOCK):
            yield view.cast("B")[begin : begin + _BLOCK]


def _deal(block: memoryview, left: deque[memoryview]) -> None:
    """Copy ``block`` into the first of the buffers, and take away from these what is full."""
    while block:
        buffer = left.popleft()
        count = min(len(block), len(buffer))
        buffer[:count] = block[:count]
        block = block[count:]
        if count < len(buffer):
            left.appendleft(buffer[count:])


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _without_password(url: str) -> str:
    # Greedy up to the last '@': a password may hold any character. Without a ':' before it, it is no password.
    return re.sub(r"://[^/@:]*:.*@", "://", url)
