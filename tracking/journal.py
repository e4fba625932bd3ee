"""The run's metrics file: one JSON object a line, every step at most once, whatever is killed.

A line is ``{"step": 12, "time": 1767225600.5, "train/loss": 0.25}``: strict JSON. What JSON has no number for stands as
the string ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``, which ``float()``, pandas and W&B read back as the number.

The trackers and the report are fed from this file, so that a tracker that is slow or down is nobody else's concern.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import mmap
import os
import time as clock
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Scalar = float | int | str | bool

_log = logging.getLogger(__name__)

_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_RESERVED = ("step", "time")
_UNWRITTEN_LIMIT = 16 << 20


@dataclass(frozen=True)
class Row:
    """The metrics of one optimizer step; ``time`` is in Unix seconds."""

    step: int
    time: float
    metrics: Mapping[str, Scalar]

    def numbers(self) -> Iterator[tuple[str, float]]:
        """The metrics that are numbers, as floats; an integer too large for one is infinite."""
        for name, value in self.metrics.items():
            if isinstance(value, (int, float)):
                try:
                    yield name, float(value)
                except OverflowError:
                    yield name, math.inf if value > 0 else -math.inf


class Journal:
    """The one writer of a metrics file. Not thread-safe.

    Steps must rise. A row for a step that is not above ``last_step`` is a replay after a restart: it is left out and
    counted in ``replayed``, so a step's metrics must come in one row.

    Trouble with the disk is reported through ``on_message``, once per kind, and never raised: rows wait in memory and
    are tried again with every call. Past ``limit`` bytes of them, new rows are left out and counted in ``lost``.

    Args:
        path: the file; made if missing. A last line that a crash left torn is cut off.
        on_message: told of trouble, in words for the user.
        limit: most bytes of rows kept in memory while they cannot be written.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        on_message: Callable[[str], None] = _log.warning,
        limit: int = _UNWRITTEN_LIMIT,
    ) -> None:
        self.path = Path(path)
        self.replayed = 0
        self.lost = 0
        self._on_message = on_message
        self._limit = limit
        self._said: set[str] = set()
        self._unwritten = bytearray()
        self._synced_at = -math.inf
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        whole, row = _last_row(self._fd)
        self.last_step = row.step if row is not None else -1
        if whole < size:
            os.ftruncate(self._fd, whole)
            self._say("torn", f"{self.path}: cut off {size - whole} bytes of a row that a crash left unfinished")
        self._unsynced = True
        _sync_folder(self.path.parent)

    def append(self, step: int, metrics: Mapping[str, Scalar], *, time: float | None = None) -> bool:
        """Add one row, by default as of now; whether it was taken."""
        return self.extend([Row(step, clock.time() if time is None else time, metrics)]) == 1

    def extend(self, rows: Iterable[Row]) -> int:
        """Add rows, in one write; how many were taken."""
        taken = 0
        for row in rows:
            if row.step <= self.last_step:
                self.replayed += 1
                continue
            line = self._encode(row)
            if len(self._unwritten) + len(line) > self._limit:
                self._write()
            if len(self._unwritten) + len(line) > self._limit:
                self.lost += 1
                self._say("lost", f"{self.path}: cannot be written: rows are left out from step {row.step} on")
                continue
            self._unwritten += line
            self.last_step = row.step
            taken += 1
        self._write()
        return taken

    def flush(self, *, min_interval: float = 0.0) -> bool:
        """Write and fsync what was taken; whether all of it is on the disk now.

        Args:
            min_interval: seconds since the last fsync below which none is made, for calling this in a loop.
        """
        if not self._write():
            return False
        if self._unsynced and clock.monotonic() - self._synced_at >= min_interval:
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._trouble(error)
                return False
            self._synced_at, self._unsynced = clock.monotonic(), False
        return not self._unsynced

    def close(self) -> None:
        """Flush and close the file. A second call does nothing."""
        if self._fd >= 0:
            self.flush()
            os.close(self._fd)
            self._fd = -1

    def _write(self) -> bool:
        while self._unwritten:
            try:
                written = os.write(self._fd, self._unwritten)
            except OSError as error:
                self._trouble(error)
                return False
            # A full disk takes part of a row: the rest goes where it ended, so the file is whole again afterwards.
            del self._unwritten[:written]
            self._unsynced = True
        if "write" in self._said:
            self._say("recovered", f"{self.path}: can be written again; {self.lost} rows were left out meanwhile")
        return True

    def _encode(self, row: Row) -> bytes:
        metrics = dict(row.metrics)
        for name in _RESERVED:
            if metrics.pop(name, None) is not None:
                self._say(f"reserved {name}", f"a metric cannot be called '{name}', as every row has one: left out")
        record: dict[str, Any] = {"step": int(row.step), "time": round(row.time, 6)} | metrics
        try:
            text = json.dumps(record, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError):
            strict = {str(name): plain(value) for name, value in record.items()}
            text = json.dumps(strict, allow_nan=False, separators=(",", ":"))
        return text.encode() + b"\n"

    def _trouble(self, error: OSError) -> None:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        self._say("write", f"{self.path}: cannot be written, {why}; rows wait in memory and training goes on")

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._on_message(text)


class Tail:
    """Follows a metrics file while it grows: each row once, in order. Lines that are no row are passed over."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._offset = 0

    def read(self, limit: int = 1 << 20) -> list[Row]:
        """The next rows, from about ``limit`` bytes of whole lines; none at the end, or while there is no file yet.

        Raises:
            OSError: the file is there and cannot be read.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            file.seek(self._offset)
            while lines := file.readlines(limit):
                if not lines[-1].endswith(b"\n"):
                    lines.pop()
                if not lines:
                    return []
                self._offset += sum(map(len, lines))
                if rows := [row for row in map(_decode, lines) if row is not None]:
                    return rows
                file.seek(self._offset)
        return []


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a metrics file, in order; none when there is no file. A torn last line is left out.

    Raises:
        OSError: the file is there and cannot be read.
    """
    tail = Tail(path)
    while rows := tail.read():
        yield from rows


def plain(value: object) -> Scalar:
    """``value`` as something strict JSON can hold: a number that it does not have as its name."""
    if isinstance(value, (bool, int, str)):
        return value
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]  # whatever it is, float() decides
    except (TypeError, ValueError):
        return str(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _decode(line: bytes) -> Row | None:
    try:
        record = json.loads(line.decode())
        step, time = record.pop("step"), record.pop("time")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(step, int) or not isinstance(time, (int, float)):
        return None
    return Row(step, time, {k: _NAMES.get(v, v) if isinstance(v, str) else v for k, v in record.items()})


def last_row(path: str | Path) -> Row | None:
    """The last whole row of a metrics file; None when it has none, or cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return _last_row(file.fileno())[1]
    except OSError:
        return None


def _last_row(fd: int) -> tuple[int, Row | None]:
    """Where the last whole row ends, in bytes, and the row; (0, None) when there is none."""
    if os.fstat(fd).st_size == 0:
        return 0, None
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as file:
        end = file.rfind(b"\n") + 1
        while end:
            start = file.rfind(b"\n", 0, end - 1) + 1
            row = _decode(file[start:end])
            if row is not None:
                return end, row
            end = start
    return 0, None


def _sync_folder(folder: Path) -> None:
    """Make a new file's name in ``folder`` survive a crash of the machine."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
