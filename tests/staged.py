"""The digits CNN with stage directions: a recipe that waits, fails or leaves at a step. Tests copy it beside a job.

    recipe: staged:Staged

waits before optimizer step 20 as long as there is a file ``wait-at-20`` in the working directory; if there is a file
``until-told`` too, until the launcher has sent the rank a message. A rank that waits is told by the link ``waiting-0``,
with the rank's number: it leads to the file that the rank waits for, so it exists no longer than that file. If it is
sent SIGTERM there, or later, there is a file ``signalled-0``.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import dltrain
import torch
from dltrain.models.cnn import CnnRecipe
from torch import Tensor, nn


class Staged(CnnRecipe):
    """Args: the optimizer step (from 0) at which it happens, on ``rank`` or, by default, on every rank.

    raise_at: raise ValueError("staged"), unless there is a file ``mended``.
    raise_once_at: raise ValueError("staged"), the first time.
    exit_at: end the process with code 0.
    sleep_at: sleep for ever.
    allocate_at: ask for four pebibytes.
    hang_in_evaluation: wait in evaluations as long as there is a file ``hang``.
    say: print this at the beginning.
    """

    def __init__(
        self,
        *,
        rank: int = -1,
        raise_at: int = -1,
        raise_once_at: int = -1,
        exit_at: int = -1,
        sleep_at: int = -1,
        allocate_at: int = -1,
        hang_in_evaluation: bool = False,
        say: str = "",
        **model: Any,
    ) -> None:
        super().__init__(**model)
        me = dltrain.context().rank
        self._mine = rank in (-1, me)
        self._waiting, self._raised = Path(f"waiting-{me}"), Path(f"raised-{me}")
        self._signalled = Path(f"signalled-{me}")
        self._raise_at, self._raise_once_at, self._exit_at = raise_at, raise_once_at, exit_at
        self._hang_in_evaluation, self._sleep_at = hang_in_evaluation, sleep_at
        self._allocate_at = allocate_at
        if say:
            print(say)

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        self._wait_while(Path(f"wait-at-{batch.step}"))
        if self._mine:
            self._act(batch.step)
        return super().loss(part, parts, batch)

    def _act(self, step: int) -> None:
        if step == self._raise_at and not Path("mended").exists():
            raise ValueError("staged")
        if step == self._raise_once_at and not self._raised.exists():
            self._raised.touch()
            raise ValueError("staged")
        if step == self._exit_at:
            os._exit(0)
        if step == self._allocate_at:
            torch.empty(1 << 50)
        while step == self._sleep_at:
            time.sleep(0.1)

    def metrics(self, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> dict[str, Tensor]:
        if self._mine and self._hang_in_evaluation:
            self._wait_while(Path("hang"))
        return super().metrics(parts, batch)

    def _wait_while(self, gate: Path) -> None:
        deadline = time.monotonic() + 300
        if not gate.exists():
            return
        self._watch_for_sigterm()
        while gate.exists() or (Path("until-told").exists() and not _told()):
            _link(self._waiting, gate)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{gate} is still there")
            time.sleep(0.01)

    def _watch_for_sigterm(self) -> None:
        heard = signal.getsignal(signal.SIGTERM)

        def tell(number: int, frame: FrameType | None) -> None:
            if callable(heard):
                heard(number, frame)
            self._signalled.touch()
            if heard == signal.SIG_DFL:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

        signal.signal(signal.SIGTERM, tell)


def _link(path: Path, target: Path) -> None:
    """Have ``path`` lead to ``target``, wherever it led before: at once, as others may look."""
    if not path.is_symlink() or path.readlink() != target:
        new = path.with_name(f".{path.name}-{os.getpid()}")
        new.symlink_to(target)
        new.replace(path)


def _told() -> bool:
    """Whether a message of the launcher waits in this rank's socket."""
    channel = dltrain.context().channel
    assert channel is not None
    with socket.socket(fileno=os.dup(channel.fileno())) as sock:
        try:
            return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
