"""What a forked child becomes: its surroundings set as a fresh process would have them, then its entry run.

``python -m dltrain.launcher.entry FD…`` is the same for a fresh interpreter (``--start-method spawn``).
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from ..core.pulse import Pulse
from ..core.wire import Channel
from .messages import ChildSpec

_PR_SET_NAME = 15


def run_child(spec: ChildSpec, fds: dict[str, int]) -> NoReturn:
    """Become the child that ``spec`` describes and end the process with its exit code.

    ``fds`` holds duplicates of the descriptors that came with the request: ``stdout``, ``stderr``, and by kind
    ``channel`` (socket to the agent), ``pulse`` (shared page), ``stacks`` (a file for Python stacks), ``news`` (the
    persister's socket to the agent), ``memory`` (the socket for snapshots' descriptors), ``listener`` (a
    listening socket).
    """
    try:
        _set_surroundings(spec, fds)
        if spec.fresh:
            _exec_fresh(spec, fds)
    except OSError as error:  # no such folder or program here
        os.write(2, f"dltrain: {spec.label} cannot start: {error}\n".encode())
        _end(127)
    code = 1
    try:
        _refresh_interpreter(spec)
        code = _ENTRIES[spec.kind](spec.body, fds)
    except SystemExit as error:
        from .script import exit_code

        code = exit_code(error)
    except BaseException:  # the last frame of a process: what goes wrong here has no one else to tell
        traceback.print_exc()
    _end(code)


def _set_surroundings(spec: ChildSpec, fds: dict[str, int]) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        os.dup2(fds[name], fd)
        os.close(fds.pop(name))
    os.environ.clear()
    os.environ.update(spec.env)
    os.chdir(spec.cwd)
    if spec.cpus:
        os.sched_setaffinity(0, spec.cpus)
    _set_process_name(spec.label)


def _set_process_name(label: str) -> None:
    _libc().prctl(_PR_SET_NAME, label.encode()[:15], 0, 0, 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _exec_fresh(spec: ChildSpec, fds: dict[str, int]) -> NoReturn:
    """Replace the fork by a new interpreter (or by the user's own program) with the same surroundings."""
    target = spec.body.get("target")
    if target and target["kind"] == "program":
        try:
            os.execvpe(target["name"], [target["name"], *target["args"]], spec.env)
        except OSError as error:  # it names the last place that was looked at
            raise OSError(error.errno, error.strerror, target["name"]) from None
    body = os.memfd_create("dltrain-spec", 0)
    os.write(body, json.dumps({**spec.to_json(), "fresh": False}).encode())
    for fd in fds.values():
        os.set_inheritable(fd, True)
    names = [f"{name}={fd}" for name, fd in {**fds, "spec": body}.items()]
    os.execve(sys.executable, [sys.executable, "-P", "-u", "-m", "dltrain.launcher.entry", *names], spec.env)


def _refresh_interpreter(spec: ChildSpec) -> None:
    """Give a fork what it must not share with its siblings, and what it would have read from its surroundings."""
    import tempfile
    from multiprocessing import process

    _open_stream("stdout", 1)
    _open_stream("stderr", 2)
    time.tzset()
    tempfile.tempdir = None
    process.ORIGINAL_DIR = spec.cwd  # pyright: ignore[reportAttributeAccessIssue]  # missing in typeshed
    process.current_process().authkey = os.urandom(32)
    random.seed()
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed()  # the global generator would be the same in every fork
    if "torch" in sys.modules:
        import torch

        torch.default_generator.seed()  # torch.seed() would seed the GPUs too, whose default is a constant
        threads = spec.threads or int(spec.env.get("OMP_NUM_THREADS") or 0)
        if threads:
            torch.set_num_threads(threads)


def _open_stream(name: str, fd: int) -> None:
    """Make ``sys.stdout`` or ``sys.stderr`` anew, unbuffered: CPython's ``create_stdio`` under ``python -u``."""
    before = getattr(sys, name)
    raw = io.FileIO(fd, "wb", closefd=False)
    raw.name = f"<{name}>"
    stream: Any = io.TextIOWrapper(
        raw,  # pyright: ignore[reportArgumentType]  # typeshed wants a buffered one
        encoding=before.encoding,
        errors=before.errors,
        newline="\n",
        write_through=True,
    )
    stream.mode = "w"
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _worker(body: dict[str, Any], fds: dict[str, int]) -> int:
    from ..training.worker import run_ranked
    from .stacks import answer

    answer(fds["stacks"])
    news, memory = socket.socket(fileno=fds["news"]), socket.socket(fileno=fds["memory"])
    return run_ranked(body, channel=_channel(fds), pulse=Pulse(fds["pulse"]), news=news, memory=memory)


def _script(body: dict[str, Any], fds: dict[str, int]) -> int:
    from ..training.context import adopt
    from .script import keep_process_groups, run_target, shut_down

    pulse = Pulse(fds["pulse"])
    channel = _channel(fds)
    pulse.mark("user")
    adopt(channel=channel, pulse=pulse, run_dir=body["run_dir"])
    if "torch" in sys.modules:
        keep_process_groups()
    try:
        code = run_target(body["target"])
        shut_down()
    finally:
        channel.flush(5)
    return code


def _store(body: dict[str, Any], fds: dict[str, int]) -> int:
    """Host one generation's rendezvous store on a listening socket, until this process is killed."""
    from datetime import timedelta

    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # public by its documentation

    store = TCPStore(
        host_name=body["address"],
        port=body["port"],
        is_master=True,
        timeout=timedelta(seconds=body["timeout"]),
        wait_for_workers=False,
        master_listen_fd=fds["listener"],
    )
    assert store.port == body["port"]
    threading.Event().wait()
    return 0


def _check(body: dict[str, Any], fds: dict[str, int]) -> int:
    """Try the job's recipe, model and data without training, and send the problems found."""
    from ..training.check import check_job

    channel = _channel(fds)
    problems = check_job(body["job"])
    channel.send({"problems": [{"what": p.what, "where": p.where, "hint": p.hint} for p in problems]})
    channel.flush(10)
    return 0


def _probe(body: dict[str, Any], fds: dict[str, int]) -> int:
    """Measure what joins this node to the others, and send it."""
    from ..training.links import measure

    channel = _channel(fds)
    channel.send(measure(body["addresses"], timeout=body["timeout"], pairings=body["pairings"]))
    channel.flush(10)
    return 0


_ENTRIES: dict[str, Callable[[dict[str, Any], dict[str, int]], int]] = {
    "worker": _worker,
    "script": _script,
    "store": _store,
    "check": _check,
    "probe": _probe,
}


def _channel(fds: dict[str, int]) -> Channel:
    return Channel(socket.socket(fileno=fds["channel"]))


def _end(code: int) -> NoReturn:
    """Flush and leave at once, as teardown can hang in gloo's threads. A negative code is a signal to die of."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    _libc().fflush(None)  # what C and C++ code printed
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    fds = {name: int(fd) for name, _, fd in (word.partition("=") for word in sys.argv[1:])}
    with os.fdopen(fds.pop("spec"), "rb") as file:
        file.seek(0)
        spec = ChildSpec.from_json(json.load(file))
    for fd in fds.values():
        os.set_inheritable(fd, False)
    fds["stdout"], fds["stderr"] = os.dup(1), os.dup(2)
    run_child(spec, fds)


if __name__ == "__main__":
    main()
