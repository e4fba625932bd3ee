"""How a tracker ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """What became of a run's metrics in a tracker.

    Attributes:
        state: 'complete': every row has arrived (W&B: the server said so). 'offline': every row lies on the disk, to be
            sent by hand. 'incomplete': something is missing. 'disabled': nothing was to be done.
        rows: rows that the tracker took.
        url: where to look at it, if anywhere.
        command: to paste into a shell: sends what was not sent.
        message: one line for the user.
    """

    state: Literal["complete", "offline", "incomplete", "disabled"]
    rows: int = 0
    url: str = ""
    command: str = ""
    message: str = ""
