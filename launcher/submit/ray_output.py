"""What the driver of a job in Ray's Jobs API prints, followed over answers that fail and connections that break."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

from ...core.errors import RunFailed
from .adapter import OVER, JobState
from .follow import Patient

_PAUSE = 1.0  # seconds between two connections
_TRIES = 10  # connections for the output of a job that is over: its machine may be gone too


class Silence(RunFailed):
    """Nothing has come over a connection for so long that it may be dead, which nobody need have said."""


def followed(tail: Callable[[], Iterator[str]], state: Callable[[], JobState]) -> Iterator[bytes]:
    """All that a job prints until its end, each character once.

    Args:
        tail: connects, and yields what was printed so far and all that comes, until the connection is closed.
        state: how the job stands.

    Raises:
        RunFailed: there was no answer at the first time, or for ten minutes; or the cluster has forgotten the job, or
            no longer has the output of one that is over.
    """
    last = state()
    ask, standing = Patient(state, last), last.standing
    shown, lost, tries = 0, False, 0
    while True:
        over, position, fault = standing in OVER, 0, None
        try:
            for text in tail():
                ask.heard()
                new = text[max(0, shown - position) :]
                position += len(text)
                if new:
                    lost, shown = False, position
                    yield new.encode()
        except Silence as error:  # in order while the job goes on; of one that is over, something may still be missing
            fault = error if over else None
        except RunFailed as error:
            fault = error
        if over and fault is None:  # known before: a connection that is closed in good order is no end
            return
        tries += over
        if fault is not None and (standing == "unknown" or tries == _TRIES):
            raise fault
        if fault is not None and not lost:
            lost = True
            sys.stderr.write(f"dltrain: {fault}: asking again\n")
            sys.stderr.flush()
        standing = ask().standing
        if fault is not None or standing not in OVER:
            time.sleep(_PAUSE)
