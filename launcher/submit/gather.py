"""Wait until a Ray cluster has as many machines as a job needs: ``gather HOST:PORT COUNT PID [SECONDS]``.

``dltrain launch`` refuses a cluster that can never hold the job, so whoever starts one waits for its machines first.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

from ...core.processes import Process
from .. import untyped

_LIMIT = 300.0  # seconds; a node that is slower than that is broken
_POLL = 0.25


def gather(address: str, count: int, starter: int, limit: float = _LIMIT) -> None:
    """Return when there are ``count`` machines at ``address`` (host:port); else end this process, with a word of why.

    It waits ``limit`` seconds at most. ``starter`` is the process of this machine that starts them: once it has ended,
    nothing more is to come.
    """
    joined = 0  # those that have room for ranks: a head may have none

    def watch() -> None:  # from beside: Ray's own connecting cannot be interrupted
        deadline = time.monotonic() + limit
        process = Process.of(starter)
        while process is not None and process.alive and time.monotonic() < deadline:
            time.sleep(_POLL)
        how = f"within {limit:g} s" if process is not None and process.alive else "when Ray ended"
        _leave(f"{joined} of {count} machines had joined the Ray cluster at {address} {how}")

    threading.Thread(target=watch, daemon=True).start()
    while not _answers(address):
        time.sleep(_POLL)
    ray = untyped.ray()
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    while (joined := sum(node["Alive"] and "CPU" in node["Resources"] for node in ray.nodes())) < count:
        time.sleep(_POLL)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _leave(text: str) -> NoReturn:
    sys.stderr.write(f"dltrain: {text}\n")
    sys.stderr.flush()
    os._exit(1)


def _asked_to(signum: int, _frame: FrameType | None) -> None:
    os._exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _asked_to)
    gather(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:]))
    os._exit(0)  # nothing to say to Ray at the end
