"""Processes with torch that follow a job's step without hardware, for a planner that has none of it imported."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import LifoQueue
from typing import Any, Self

from ..core.errors import RunFailed

_PROGRAM = (sys.executable, "-P", "-m", "dltrain.training.dryrun")
_LONGEST = 600.0  # seconds that an answer may take
_LOOK = 0.25
_SHOWN = 2000  # characters of what a process that died has said


class DryRuns:
    """So many processes, started by the first requests; they end when this is left.

    Args:
        meanwhile: called now and then by :meth:`result`.
    """

    def __init__(self, processes: int, meanwhile: Callable[[], None] | None = None) -> None:
        self._meanwhile = meanwhile
        self._threads = ThreadPoolExecutor(processes, "dltrain-plan")
        self._idle: LifoQueue[_Process] = LifoQueue()  # the one that has torch already is asked again
        self._all: list[_Process] = []
        for _ in range(processes):
            process = _Process()
            self._all.append(process)
            self._idle.put(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.close()

    def ask(self, request: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """The answer of the next process that is free.

        The future raises RunFailed where the process died, or did not answer in time.
        """
        return self._threads.submit(self._answer, request)

    def result(self, answer: Future[dict[str, Any]]) -> dict[str, Any]:
        """Wait for an answer."""
        while self._meanwhile is not None and not wait([answer], timeout=_LOOK).done:
            self._meanwhile()
        return answer.result()

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._idle.get()
        try:
            return process.answer(request)
        finally:
            self._idle.put(process)


class _Process:
    """One process, started when it is first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
            self._process = subprocess.Popen(
                _PROGRAM,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env=_environment(os.environ),
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], _LONGEST)[0]:
                raise RunFailed(f"following the job's step took longer than {_LONGEST:g} s")
            line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            said = self._said.read().decode(errors="replace")[-_SHOWN:].strip()
            raise RunFailed(f"the process that follows the job's step died:\n{said}")
        return json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._said.close()


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """No GPU, one thread, and what DeepSpeed wants to read of a rank."""
    ours = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return {**environ, **ours, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
