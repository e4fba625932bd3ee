"""TensorBoard event files, written from the journal by a thread. Neither torch nor TensorFlow is needed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import JobError, Problem
from .journal import Row, Tail
from .outcome import Outcome

_POLL_SECONDS = 2.0


def available() -> bool:
    """Whether the package ``tensorboard`` is installed."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorBoardPump:
    """Writes the journal's numbers into ``<run_dir>/tensorboard``, from construction until :meth:`finish`.

    A resumed run writes its file anew from the whole journal, in place of the older one, so each step is there once.
    Trouble is told through ``on_message``, once per kind of it and from the pump's thread; it is tried again.

    Args:
        journal: the run's metrics file. It need not be there yet.
        run_dir: the event file goes into its folder ``tensorboard``.
        on_message: told of trouble, in words for the user.
        pause: seconds before a new try after trouble.

    Raises:
        JobError: the package is not installed.
    """

    def __init__(
        self, journal: str | Path, run_dir: str | Path, *, on_message: Callable[[str], None], pause: float = 10.0
    ) -> None:
        if not available():
            hint = "pip install 'dltrain[tensorboard]'"
            raise JobError(Problem("the package tensorboard is not installed", "tracking.tensorboard", hint))
        self._journal = Path(journal)
        self._folder = Path(run_dir).absolute() / "tensorboard"
        self._on_message = on_message
        self._pause = pause
        self._said: set[str] = set()
        self._rows = 0
        self._complete = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorboard-pump", daemon=True)
        self._thread.start()

    def finish(self, timeout: float) -> Outcome:
        """Write the rest of what the journal's file holds; waits ``timeout`` seconds at most."""
        self._stop.set()
        self._thread.join(timeout)
        command = f"tensorboard --logdir {shlex.quote(str(self._folder))}"
        if self._complete and not self._thread.is_alive():
            return Outcome("complete", self._rows, command=command, message=f"TensorBoard: {command}")
        return Outcome("incomplete", self._rows, message=f"TensorBoard: not all rows are in {self._folder}")

    def _run(self) -> None:
        while not self._complete:
            try:
                self._write()
                self._complete = True
            except Exception as error:  # a tracker is never the reason that a run fails
                self._say(error)
                if self._stop.wait(self._pause):
                    return

    def _write(self) -> None:
        """One file, from the journal's first row to its last."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob("events.out.tfevents.*"):
            # A TensorBoard that follows a file goes on to the next one at its end, but never when it is gone.
            if old.stat().st_size:
                os.truncate(old, 0)
            else:
                old.unlink()
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._rows = 0
        tail = Tail(self._journal)
        with (self._folder / name).open("wb") as file:
            events = _Events(file)
            while True:
                stopping = self._stop.is_set()
                rows = tail.read()
                for row in rows:
                    events.write(row)
                self._rows += len(rows)
                if not rows:
                    file.flush()
                    if stopping:
                        os.fsync(file.fileno())
                        return
                    self._stop.wait(_POLL_SECONDS)

    def _say(self, error: Exception) -> None:
        kind = type(error).__name__
        if kind not in self._said:
            self._said.add(kind)
            self._on_message(f"TensorBoard: {kind}: {error}. Training goes on; the metrics are in {self._journal}")


class _Events:
    """Writes TensorBoard's records to a file that is open for them."""

    def __init__(self, file: BinaryIO) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        # The module's classes are made when it is imported, so a type checker cannot know them.
        self._event: Any = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._records = RecordWriter(file)
        now = time.time()
        self._put(self._event(wall_time=now, file_version="brain.Event:2"))
        # Has a TensorBoard that runs meanwhile drop what it has read of the file before.
        start = self._event(wall_time=now)
        start.session_log.status = start.session_log.START
        self._put(start)

    def write(self, row: Row) -> None:
        event = self._event(wall_time=row.time, step=row.step)
        for name, value in row.numbers():
            event.summary.value.add(tag=name, simple_value=value)
        if event.summary.value:
            self._put(event)

    def _put(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
