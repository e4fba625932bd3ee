"""dltrain's side of ``benchmarks/recovery.py``: the model, data and pace of ``recovery_loop.py`` as a recipe."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dltrain
import numpy as np
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PAUSE = 0.02
WIDTH = 256


class Paced(dltrain.Recipe):
    def __init__(self, out: str) -> None:
        self._out, self._rank = Path(out), dltrain.context().rank
        self._step = -1
        if os.environ.get("RANK"):
            (self._out / f"pid-{self._rank}").write_text(str(os.getpid()))
        self._stamps = (self._out / "stamps").open("a", buffering=1)

    def parts(self) -> dict[str, nn.Module]:
        return {"net": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))}

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> Tensor:
        if batch.step != self._step:
            self._step = batch.step
            if self._rank == 0:
                self._stamps.write(f"{batch.step} {time.time()!r}\n")
            time.sleep(PAUSE)
        return cross_entropy(parts[part](batch["x"]), batch["y"])


def samples() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {"x": draw.standard_normal((4096, WIDTH), np.float32), "y": draw.integers(0, 10, 4096)}
