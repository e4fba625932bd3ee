"""The rank program in processes forked from one that has imported torch: a whole training run in a second.

What ``torchrun -m dltrain.training.worker`` does, without the seconds that every rank's imports take.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
from runs import RunFolder

_PRELOAD = ["torch", "torch._dynamo", "torch.distributed.checkpoint.planner_helpers", "dltrain.training.worker"]
_PRELOAD += ["dltrain.models.cnn"]


def preload(*modules: str) -> None:
    """Have these modules imported before ranks are forked too; to be called as a test module is imported."""
    _PRELOAD.extend(modules)


def train_ranks(folder: Path, world: int, *job: str, timeout: float = 120, **environ: str) -> RunFolder:
    """Train a job on ``world`` ranks of one thread each, from ``folder``; ``job`` is a file's name and overrides.

    Raises:
        AssertionError: a rank ended with another exit code than 0; with what the ranks printed.
    """
    ended = run_ranks(_worker, world, folder, job, timeout=timeout, environ=environ)
    printed = "\n".join((folder / f"rank{rank}.log").read_text() for rank in range(world))
    assert ended == [0] * world, f"exit codes {ended}\n{printed}"
    (found,) = (folder / "runs").glob("*/torchrun")
    return RunFolder(found)


def run_ranks(
    program: Callable[..., int],
    world: int,
    folder: Path,
    *arguments: Any,
    timeout: float = 120,
    environ: Mapping[str, str] | None = None,
) -> list[int]:
    """Run ``program(*arguments)`` as every one of ``world`` ranks; their exit codes.

    ``program`` is a module's function, and runs in ``folder`` with torchrun's environment; its output goes to
    ``rank<r>.log`` there. When one rank fails the others get half a minute to do so too.
    """
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(_PRELOAD)
    _start_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        **(environ or {}),
    }
    ranks = [
        fork.Process(target=_as_rank, args=(rank, str(folder), shared, program, arguments)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    while running := [process.sentinel for process in ranks if process.exitcode is None]:
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + 30)
        if not wait(running, max(0.0, deadline - time.monotonic())):
            for process in ranks:
                process.kill()
    return [process.exitcode or 0 for process in ranks]


def _start_server() -> None:
    """Start the process that ranks are forked from, if there is none yet; it must not start a thread pool."""
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if given is not None:
            os.environ["OMP_NUM_THREADS"] = given


def _as_rank(
    rank: int, folder: str, shared: dict[str, str], program: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    os.chdir(folder)
    os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    log = os.open(f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)
    code = 70
    try:
        code = program(*arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)  # interpreter teardown can hang in gloo's threads


def _worker(job: tuple[str, ...]) -> int:
    from dltrain.training import worker

    return worker.main(list(job))
