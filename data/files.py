"""The files behind a path or URL, found, named in messages, and opened; reader options, checked. No torch."""

from __future__ import annotations

import gzip
import io
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from pydantic import ValidationError

from ..core.errors import JobError, Problem
from ..core.formats import KNOWN, Format, format_of, is_url, missing_package, no_such_file
from ..core.schema import explain
from ..core.spec import Spec
from ..core.storage import Storage

SOURCE = "data.source"
OPTIONS = "data.options"

_GZIP = b"\x1f\x8b"
_BLOCK = 32 << 20  # bytes of a remote file copied at a time
_SHOWN = 8

S = TypeVar("S", bound=Spec)


def wrong(what: str, hint: str = "", where: str = SOURCE) -> JobError:
    """The refusal of a source."""
    return JobError(Problem(what, where, hint))


@dataclass(frozen=True)
class Files:
    """Files of one folder.

    Attributes:
        storage: the folder, open in this process.
        url: the folder, a path or URL, as the user wrote it.
        names: the files relative to the folder, sorted.
        is_folder: whether the folder was named, rather than its one file.
        where: the job's key that named them.
    """

    storage: Storage
    url: str
    names: tuple[str, ...]
    is_folder: bool
    where: str = SOURCE

    def shown(self, name: str) -> str:
        """The file as messages name it."""
        return f"{self.url}/{name}" if is_url(self.url) else str(Path(self.url, name))

    def local(self, name: str) -> Path | None:
        """The file's path where it lies on a local filesystem."""
        return None if is_url(self.url) else Path(self.url).expanduser() / name

    def of(self, *formats: Format) -> tuple[str, ...]:
        """The names of the files in one of these formats; a file that was named itself is believed to be."""
        return tuple(n for n in self.names if format_of(n) in formats) if self.is_folder else self.names

    def one(self, format: Format) -> str:
        """The name of the only file in this format.

        Raises:
            JobError: there are several, or none.
        """
        found = self.of(format)
        if len(found) != 1:
            shown = ", ".join(found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
            raise wrong(f"'{self.url}' holds {len(found)} {format} files", f"name one of {shown}", self.where)
        return found[0]

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """The file's content, unpacked where it is gzip: the first two bytes tell, not the name."""
        path = self.local(name)
        with path.open("rb") if path is not None else io.BytesIO(self._read(name)) as raw:
            packed = raw.read(2) == _GZIP
            raw.seek(0)
            if not packed:
                yield raw
                return
            with gzip.open(raw) as unpacked:
                yield cast(BinaryIO, unpacked)

    @contextmanager
    def mappable(self, name: str) -> Iterator[Path]:
        """A path to map the file into memory from, in this block; a remote file is copied to disk, without a name."""
        path = self.local(name)
        if path is not None:
            yield path
            return
        with tempfile.TemporaryFile() as copy:
            size = self.storage.size(name)
            for begin in range(0, size, _BLOCK):
                copy.write(self.storage.read_range(name, begin, min(begin + _BLOCK, size)))
            copy.flush()
            yield Path(f"/proc/self/fd/{copy.fileno()}")

    def _read(self, name: str) -> bytearray:
        return self.storage.read_range(name, 0, self.storage.size(name))

    @contextmanager
    def reading(self, name: str, format: str) -> Iterator[None]:
        """Turn what goes wrong while a file is read into a refusal that names it."""
        try:
            yield
        except FileNotFoundError as error:
            raise wrong(f"no such file: '{self.shown(name)}'", where=self.where) from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise wrong(f"'{self.shown(name)}' cannot be read as {format}: {error}", where=self.where) from error


def locate(source: str, storage: Mapping[str, Any] | None = None, *, where: str = SOURCE) -> Files:
    """The files at a path or URL: one file, or all in a folder and below but those whose names begin with a dot.

    Args:
        storage: storage options of a URL.
        where: the job's key that names them, for messages.

    Raises:
        JobError: nothing is there, or the storage cannot be reached.
    """
    plain = source.rstrip("/")
    try:
        if not is_url(source):
            path = Path(source).expanduser()
            if not path.exists():
                raise JobError(no_such_file(source, where))
            if path.is_dir():
                return _folder(Storage(source, where=where), plain or "/", where)
            folder = Storage(str(path.parent), where=where)
            return Files(folder, str(path.parent), (path.name,), False, where)
        parent, _, name = plain.rpartition("/")
        if not parent.endswith(":/"):  # else there is nothing but a bucket or host
            folder = Storage(parent, storage, where=where)
            if folder.exists(name):
                return Files(folder, parent, (name,), False, where)
        return _folder(Storage(plain, storage, where=where), plain, where)
    except OSError as error:
        raise wrong(f"'{source}' cannot be read: {error.strerror or error}", where=where) from error


def _folder(storage: Storage, url: str, where: str) -> Files:
    names = tuple(n for n in storage.names() if not any(part.startswith(".") for part in n.split("/")))
    if not names:
        raise wrong(f"no such file: '{url}'" if is_url(url) else f"the folder '{url}' is empty", where=where)
    return Files(storage, url, names, True, where)


def tell_format(files: Files, format: Format) -> Format:
    """``format``, or where that is 'auto' what the names of the files tell; its package is there.

    Raises:
        JobError: they tell none, or several.
    """
    if format == "auto":
        told: set[Format] = {found for name in files.names if (found := format_of(name)) is not None}
        what = files.url if files.is_folder else files.shown(files.names[0])
        if not told:
            hint = f"known: {KNOWN}; or set data.format"
            raise wrong(f"'{what}': no file's ending tells a format", hint, files.where)
        if len(told) > 1:
            raise wrong(f"'{what}' holds files of several formats: {', '.join(sorted(told))}", "set data.format")
        format = told.pop()
    for problem in missing_package(format):
        raise JobError(replace(problem, where=files.where))
    return format


def read_options(model: type[S], options: Mapping[str, Any]) -> S:
    """A reader's options, checked.

    Raises:
        JobError: with every problem, in the words of job files.
    """
    try:
        return model.model_validate(options)
    except ValidationError as error:
        problems = explain(error, model, options)
        raise JobError(*(replace(p, where=".".join([OPTIONS, *path])) for path, p in problems)) from None
