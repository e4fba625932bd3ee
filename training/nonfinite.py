"""Steps that changed nothing, since a loss or a gradient was not finite: the run ends there, or leaves them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.distributed as dist

from ..core.contracts import KeyedSource, Source, StepResult
from ..core.errors import NonFiniteLoss
from ..core.job import Job
from ..data.order import StepPlan
from ..data.split import Indices, look_up
from .context import Context
from .reporter import Reporter

_SHOWN = 8  # samples of a microbatch that a message names; the report has them all


class Guard:
    """Decides alike on every rank what comes of such a step.

    Args:
        source: the samples, of which ``train`` (indices) are trained on.
    """

    def __init__(
        self, job: Job, plan: StepPlan, source: Source, train: Indices, *, ctx: Context, reporter: Reporter
    ) -> None:
        self._policy = job.train.nonfinite
        self._plan, self._source, self._train = plan, source, train
        self._data_ranks = job.parallel.axes(ctx.world_size)["data"]
        self._ctx, self._reporter = ctx, reporter
        self._skipped: dict[str, int] = {}

    def take(self, step: int, result: StepResult) -> None:
        """Consider the result of ``step``. Collective where a part's step was not finite, which every rank knows.

        Raises:
            NonFiniteLoss: the job wants the run to stop at such a step.
        """
        self._say_overflow(step + 1, result)
        if not result.nonfinite:
            return
        everyone: list[Any] = [result.nonfinite] * self._ctx.world_size
        if self._ctx.world_size > 1:
            dist.all_gather_object(everyone, result.nonfinite)
        for part in result.nonfinite:
            found: dict[int, tuple[int, float]] = {}  # the ranks of a tensor group have the same microbatches
            for rank, parts in enumerate(everyone):
                for index, loss in parts.get(part, {}).items():
                    found.setdefault(index, (rank, loss))
            self._settle(step, part, found)

    def skipped(self, result: StepResult) -> dict[str, int]:
        """By part of this step, how many of its steps were left out so far; for the metrics."""
        scaled = {part: found.skipped for part, found in result.scaling.items()}
        if self._policy == "stop":
            return scaled
        return {part: self._skipped.get(part, 0) for part in result.loss} | scaled

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return dict(self._skipped)

    def load(self, state: Mapping[str, int]) -> None:
        self._skipped = dict(state)

    def _settle(self, step: int, part: str, found: Mapping[int, tuple[int, float]]) -> None:
        samples = [self._evidence(step, index, rank, loss) for index, (rank, loss) in sorted(found.items())]
        words = "; ".join(_told(one) for one in samples)
        what = f"the loss of '{part}' is not finite at step {step}: {words}"
        if not samples:
            what = f"the gradients of '{part}' are not finite at step {step}, though every loss is"
            owners = [self._plan.owner(index, self._data_ranks) for index in range(self._plan.microbatches)]
            samples = [self._evidence(step, index, owner, None) for index, owner in enumerate(owners)]
        if self._policy == "stop":
            blamed = any(rank == self._ctx.rank for rank, _ in found.values())
            raise NonFiniteLoss(what, samples=samples, witness=bool(found) and not blamed)
        first = not self._skipped
        self._skipped[part] = self._skipped.get(part, 0) + 1
        if first and self._ctx.rank == 0:
            text = f"{what}. The step changed no weight; train/skipped_steps counts such steps, this is told once"
            self._reporter.send("note", text=text)

    def _evidence(self, step: int, index: int, rank: int, loss: float | None) -> dict[str, Any]:
        """Which samples a microbatch has, JSON-able; ``rank`` is of the data group where all losses are finite."""
        places, _ = self._plan.microbatch(step, index)
        indices = look_up(self._train, places)
        found: dict[str, Any] = {"rank": rank, "microbatch": index, "loss": None if loss is None else str(loss)}
        found["indices"] = indices.tolist()
        if isinstance(self._source, KeyedSource):
            found["keys"] = np.asarray(self._source.sample_keys(indices)).tolist()
        return found

    def _say_overflow(self, done: int, result: StepResult) -> None:
        """Tell of the first step that loss scaling skipped; the metrics count them all."""
        for part, found in result.scaling.items():
            if found.overflowed and found.skipped == 1 and self._ctx.rank == 0:
                text = (
                    f"step {done} changed no weight of '{part}': gradients overflowed float16 with the loss scaled by "
                    f"{found.factor:g}. The scale is halved; train/skipped_steps counts such steps, of which a few are "
                    "normal"
                )
                self._reporter.send("note", text=text)


def _told(evidence: Mapping[str, Any]) -> str:
    indices: list[int] = evidence["indices"]
    shown = ", ".join(map(str, indices[:_SHOWN]))
    more = f" and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else ""
    where = f"microbatch {evidence['microbatch']} on rank {evidence['rank']}"
    return f"{evidence['loss']} in {where}, of the samples {shown}{more}"
