"""Try a job's code in a forked child before any rank starts: its recipe, its model's arguments, its data."""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Any

from ..core.errors import JobError, Problem
from ..core.wire import Channel
from .host import ForkServer
from .messages import ChildSpec, Exit


def check_job(
    server: ForkServer, job: dict[str, Any], *, environ: dict[str, str], cwd: str, timeout: float
) -> list[Problem]:
    """The problems that running the job's own code shows. ``server`` must have answered hello.

    Raises:
        JobError: the job's code ended the process, or took longer than ``timeout`` seconds.
    """
    env = {**environ, "OMP_NUM_THREADS": "1"}
    spec = ChildSpec(kind="check", label="dltrain-check", env=env, cwd=cwd, threads=1, body={"job": job})
    ours, theirs = socket.socketpair()
    output = os.memfd_create("dltrain-check-output")
    channel = Channel(ours)
    try:
        child = server.fork(spec, {"stdout": output, "stderr": output, "channel": theirs.fileno()})
        theirs.close()
        deadline = time.monotonic() + timeout
        messages: list[dict[str, Any]] = []
        while time.monotonic() < deadline:
            ended = [event.exit for event in server.events(0.05) if event.id == child and event.exit is not None]
            messages += channel.receive()
            if ended:
                break
        else:
            server.signal(child, signal.SIGKILL)
            what = f"building the recipe and opening the data took longer than {timeout:g} s"
            raise JobError(Problem(what, "recovery.start_timeout", "give it more time"))
        if not messages:
            text = os.pread(output, 1 << 16, 0).decode(errors="replace").strip()
            what = f"building the recipe or opening the data {_words(ended[0])}\n{text}"
            raise JobError(Problem(what, "recipe"))
        return [Problem(**problem) for problem in messages[0]["problems"]]
    finally:
        channel.close()
        os.close(output)


def _words(ended: Exit) -> str:
    if ended.signal is not None:
        return f"was killed by {signal.Signals(ended.signal).name}"
    return f"ended the process with exit code {ended.code}"
