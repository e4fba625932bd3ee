"""Submitted jobs from their hand-over to their end: one way for every kind of cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from ...core.errors import JobError, Problem, RunFailed, did_you_mean
from ..rundir import check_parent
from .adapter import OVER, Adapter, JobState
from .clusters import KINDS
from .follow import Patient
from .handle import Handle
from .handles import write_handle
from .steps import Submission

_POLL = 1.0
_TRACKERS = 120.0  # seconds that the end of a job may take beside the ranks' own: trackers, weights, Ray's end


def submit(adapter: Adapter, submission: Submission, say: Callable[[str], None]) -> Handle:
    """Hand a job over and write its handle; returns while it runs, or waits.

    Raises:
        JobError: the cluster cannot take it, or the runs folder cannot be written; nothing was started.
        RunFailed: the cluster has not taken it; or it has, and its handle cannot be written.
    """
    check_parent(submission.runs / submission.name)
    adapter.render(submission)
    handle = adapter.hand_over(submission, say)
    try:
        write_handle(submission.runs, handle)
    except OSError as error:
        taken = f"the job runs as {handle.kind} {handle.id}"
        raise RunFailed(f"{taken}, but dltrain cannot keep that in {submission.runs}: {error.strerror}") from error
    return handle


def kind_of(handle: Handle) -> type[Adapter]:
    """The class that knows the handle's kind of cluster.

    Raises:
        JobError: none does.
    """
    if handle.kind not in KINDS:
        raise JobError(Problem(f"no kind of cluster is called '{handle.kind}'", hint=did_you_mean(handle.kind, KINDS)))
    return KINDS[handle.kind]


def state_of(handle: Handle) -> JobState:
    """How a job stands now. Raises RunFailed where nobody answers, JobError for an unknown kind."""
    return kind_of(handle).state(handle)


def output_of(handle: Handle, *, follow: bool) -> Iterator[bytes]:
    """What a job's driver prints; followed, until the job is over."""
    return kind_of(handle).output(handle, follow=follow)


def wait_for(handle: Handle, *, limit: float | None = None) -> JobState:
    """How the job stands when it is over.

    Raises:
        RunFailed: it is not, after ``limit`` seconds; or nobody has answered for ten minutes, or at the first time.
    """
    deadline = None if limit is None else time.monotonic() + limit
    ask = Patient(partial(state_of, handle), state_of(handle))
    while (state := ask()).standing not in OVER:
        if deadline is not None and time.monotonic() > deadline:
            raise RunFailed(f"{handle.name}/{handle.key} has not ended within {limit:g} s: {state.words}")
        time.sleep(_POLL)
    return state


def stop_job(handle: Handle, *, now: bool, say: Callable[[str], None]) -> JobState:
    """Have a job end, after a last checkpoint unless ``now``, and wait until it has; nothing happens to one that has.

    Raises:
        RunFailed: it did not end in time, or its cluster does not answer.
    """
    state = state_of(handle)
    if state.standing in OVER:
        return state
    limit = handle.stop_grace + _TRACKERS
    aim = "end at once" if now or state.standing == "queued" else "save a checkpoint and end"
    say(f"waiting for {handle.name}/{handle.key} to {aim} (at most {limit:g} s)")
    kind_of(handle).stop(handle, now=now)
    return wait_for(handle, limit=limit)
