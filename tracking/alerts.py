"""What a tracker is to tell people of at once: appended to ``alerts.jsonl`` of the run, and sent from there."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from .files import write_whole

FILE = "alerts.jsonl"
Level = Literal["INFO", "WARN", "ERROR"]


@dataclass(frozen=True)
class Alert:
    """One alert: as W&B's, with the Unix time of what it tells."""

    title: str
    text: str
    level: Level
    at: float


def raise_alert(run_dir: Path, title: str, text: str, level: Level) -> None:
    """Keep an alert, for whoever feeds a tracker. A disk that takes nothing loses it: the report is elsewhere too."""
    line = json.dumps(asdict(Alert(title, text, level, time.time()))) + "\n"
    with suppress(OSError), (run_dir / FILE).open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def alerts(run_dir: Path) -> list[Alert]:
    """All alerts of a run so far, in order; a line that a crash has cut off is none."""
    found: list[Alert] = []
    with suppress(OSError):
        for line in (run_dir / FILE).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError):
                found.append(Alert(**json.loads(line)))
    return found


class Sent:
    """How many of a run's alerts were sent, in a file: however often their sender is started, each is sent once."""

    def __init__(self, path: Path, *, anew: bool) -> None:
        self._path = path
        self.count = 0
        if not anew:
            with suppress(OSError, ValueError):
                self.count = int(path.read_text())

    def add(self) -> None:
        """One more."""
        self.count += 1
        write_whole(self._path, f"{self.count}\n")
