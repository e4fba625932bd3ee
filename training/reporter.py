"""Where a rank's news goes: to its node agent, or, under plain torchrun, to rank 0's own files and terminal."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from base64 import b64encode
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..core.rows import Row, RowReducer
from ..core.wire import Channel
from ..tracking.journal import Journal
from ..tracking.samples import keep

_A_MOMENT = 1e-4  # seconds
_ON_THE_WAY = 1.0  # seconds until rows that were sent are taken to have reached the controller


class Reporter(ABC):
    """Rows are kept until :meth:`sync`, which all ranks call at the same steps."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._encoded: list[bytes] = []
        """Of the first of the rows, as JSON."""
        self._last_row = 0
        self._stop = False
        self._signal = ""

    def row(self, row: Row) -> None:
        self._rows.append(row)
        self._last_row = row["step"]

    def annotate(self, metrics: Mapping[str, float]) -> None:
        """Add reduced metrics, such as an evaluation's, to the newest row that is still here. Rank 0's count."""
        if self._rows:
            self._rows[-1]["metrics"].update(metrics)
            del self._encoded[len(self._rows) - 1 :]

    def preempt(self, signal: str) -> None:
        """A signal of this name wants the rank to end: ask for a stop at the next question to all ranks.

        Safe in a signal handler.
        """
        self._signal, self._stop = signal, True

    @property
    def stop_requested(self) -> bool:
        return self._stop

    @abstractmethod
    def sync(self) -> None:
        """Deliver the rows kept so far and take in requests. May be collective."""

    @abstractmethod
    def unsettled(self) -> int:
        """Step of the newest row that somebody else has still to bring to the disk; 0 where there is none. For rank 0,
        after all ranks have called :meth:`sync`: a checkpoint must not be ahead of the metrics.
        """

    @abstractmethod
    def recent(self) -> tuple[int, bytes]:
        """For a snapshot in memory: the step of the newest row, and, as a JSON list, the newest rows: of as many as may
        not have reached the controller.
        """

    @abstractmethod
    def delivered(self) -> bool:
        """Whether all that was sent has left this process. What it keeps back would be lost with it."""

    @abstractmethod
    def send(self, kind: str, **data: Any) -> None:
        """Tell of an event at once."""

    @abstractmethod
    def image(self, step: int, name: str, png: bytes) -> None:
        """Show a picture, drawn after ``step`` completed steps. For rank 0."""

    @abstractmethod
    def close(self, timeout: float) -> None:
        """Deliver what is left, waiting at most ``timeout`` seconds."""


class ChannelReporter(Reporter):
    """Tells the node agent. Never blocks, except in :meth:`close`."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel
        self._sent: deque[tuple[float, bytes]] = deque()

    def sync(self) -> None:
        if self._signal:
            self.send("preempted", signal=self._signal)
            self._signal = ""
        if self._rows:
            self._channel.send({"t": "rows", "rows": self._rows})
            self._encode()
            now = time.monotonic()
            self._sent.extend((now, encoded) for encoded in self._encoded)
            self._rows, self._encoded = [], []
        for message in self._channel.receive():
            match message["t"]:
                case "stop":
                    self._stop = True
                case other:
                    raise ValueError(f"the agent sent a message of kind {other!r}")

    def unsettled(self) -> int:
        return self._last_row

    def recent(self) -> tuple[int, bytes]:
        self._encode()
        old = time.monotonic() - _ON_THE_WAY
        while self._sent and self._sent[0][0] < old:
            self._sent.popleft()
        return self._last_row, b"[" + b",".join([*(encoded for _, encoded in self._sent), *self._encoded]) + b"]"

    def _encode(self) -> None:
        """Each row once: with a snapshot in every step it would be encoded again and again."""
        rows = self._rows[len(self._encoded) :]
        self._encoded += [json.dumps(row, separators=(",", ":")).encode() for row in rows]

    def delivered(self) -> bool:
        return self._channel.flush(_A_MOMENT)

    def image(self, step: int, name: str, png: bytes) -> None:
        self.send("image", step=step, name=name, png=b64encode(png).decode())

    def send(self, kind: str, **data: Any) -> None:
        self._channel.send({"t": kind, **data})

    def close(self, timeout: float) -> None:
        self.sync()
        self._channel.flush(timeout)


class StandaloneReporter(Reporter):
    """For ``torchrun -m dltrain.training.worker``: rank 0 writes metrics.jsonl and prints a line now and then."""

    def __init__(self, *, rank: int, world: int, run_dir: Path) -> None:
        super().__init__()
        self._rank, self._world, self._run_dir = rank, world, run_dir
        self._reducer = RowReducer(world)
        self._journal = Journal(run_dir / "metrics.jsonl", on_message=self._print) if rank == 0 else None
        self._printed = 0.0

    def sync(self) -> None:
        rows, self._rows = self._rows, []
        everyone: list[list[Row]] = [rows]
        if self._world > 1:
            gathered: list[list[Row] | None] = [None] * self._world
            dist.gather_object(rows, gathered if self._rank == 0 else None)
            everyone = [item or [] for item in gathered]
        if self._journal is None:
            return
        for rank, ranks_rows in enumerate(everyone):
            for row in self._reducer.add(rank, ranks_rows):
                self._journal.append(row.step, row.metrics)
                if row.metrics.keys() & {"val/loss", "test/loss"} or time.monotonic() - self._printed > 5:
                    self._printed = time.monotonic()
                    shown = {name: f"{value:.4g}" for name, value in row.metrics.items()}
                    self._print(f"step {row.step}  " + "  ".join(f"{name} {value}" for name, value in shown.items()))

    def unsettled(self) -> int:
        if self._journal is not None and not self._journal.flush():
            self._print("the metrics are not on the disk; saving all the same")
        return 0

    def recent(self) -> tuple[int, bytes]:
        return 0, b"[]"

    def delivered(self) -> bool:
        return True

    def image(self, step: int, name: str, png: bytes) -> None:
        if self._rank == 0:
            keep(self._run_dir, step=step, name=name, png=png)

    def send(self, kind: str, **data: Any) -> None:
        if self._rank == 0 and kind in ("note", "saved", "trouble", "end"):
            self._print(f"{kind}: " + ", ".join(f"{name}={value}" for name, value in data.items()))

    def close(self, timeout: float) -> None:
        if self._journal is not None:
            self._journal.close()

    @staticmethod
    def _print(text: str) -> None:
        print(text, flush=True)  # noqa: T201  # the terminal is this reporter's outlet
