"""Recipes whose ranks are killed where a file says so. Tests copy this beside a job.

    recipe: killed:Cnn

``kills.json`` lists for each generation of ranks the deaths in it: ``{"rank", "step", "how"}``. How: "rank" kills the
rank in its forward pass of the step (from 0), "both" its persister too, "torn" in the middle of the snapshot after the
step, when the pieces are copied but do not count yet. No rank dies before all have the snapshot before the step: they
take it without waiting for each other, and the launcher ends those that are late.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dltrain
from dltrain.models.cnn import CnnRecipe
from dltrain.models.gan import GanRecipe
from dltrain.models.transformer import TransformerRecipe
from dltrain.training.staging import ImagePlan, Stage
from torch import Tensor, nn

_commit = Stage.commit


def _commit_and_tell(stage: Stage, plan: ImagePlan, text: bytes, **place: int) -> None:
    _commit(stage, plan, text, **place)
    Path(f"snapshot-{dltrain.context().restart}-{place['step']}-{place['rank']}").touch()


Stage.commit = _commit_and_tell


class _Killed:
    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        ctx = dltrain.context()
        for death in _deaths(ctx):
            if death["step"] == batch.step:
                _await_snapshot(ctx, batch.step)
                _die(death["how"])
        return super().loss(part, parts, batch)  # pyright: ignore[reportAttributeAccessIssue]  # of the recipe beside it


def _deaths(ctx: dltrain.Context) -> list[dict[str, Any]]:
    generations = json.loads(Path("kills.json").read_text()) if ctx.launched else []
    now = generations[ctx.restart] if ctx.restart < len(generations) else []
    return [death for death in now if death["rank"] == ctx.rank]


def _await_snapshot(ctx: dltrain.Context, step: int) -> None:
    deadline = time.monotonic() + 100
    while len(list(Path.cwd().glob(f"snapshot-{ctx.restart}-{step}-*"))) < ctx.world_size:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not every rank has a snapshot of step {step}")
        time.sleep(0.005)


def _die(how: str) -> None:
    if how == "torn":
        Stage.commit = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        return
    if how == "both":
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        assert children, "a rank has a persister"
        for child in children:
            os.kill(int(child), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class Cnn(_Killed, CnnRecipe): ...


class Transformer(_Killed, TransformerRecipe): ...


class Gan(_Killed, GanRecipe): ...
