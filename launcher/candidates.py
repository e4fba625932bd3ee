"""The ways to spread a job that a plan looks at: pure arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..core.checks import check_job
from ..core.errors import JobError
from ..core.job import Job
from ..core.parallel import Parallel, microbatches_per_step

_DEEPEST = 16  # stages; more are seldom worth their bubble
_KEPT = ("bucket_mb", "deepspeed", "offload", "compress", "pipeline_schedule", "pipeline_chunks", "reduce", "reshard")


@dataclass(frozen=True)
class Candidate:
    """One way to spread the job.

    Attributes:
        values: what it says, by dotted key of the job; empty for the job as it stands.
        job: the job with these values; None where they contradict each other.
        reason: why it cannot be, if it cannot.
    """

    values: Mapping[str, Any]
    job: Job | None
    reason: str = ""

    @property
    def depth(self) -> int:
        """How involved it is: 0 for data-parallel ranks alone, 1 with tensor groups, 2 with pipelines."""
        if self.values.get("parallel.pipeline", 1) > 1:
            return 2
        return 1 if self.values.get("parallel.tensor", 1) > 1 else 0


def candidates(job: Job, *, world: int, per_node: int) -> list[Candidate]:
    """Ways to spread ``job`` over ``world`` ranks, ``per_node`` on each node, the simplest first."""
    return [with_values(job, values, world=world) for values in _meshes(world, per_node)]


def with_values(job: Job, values: Mapping[str, Any], *, world: int) -> Candidate:
    """``job`` with ``values``, checked as far as arithmetic goes."""
    data: dict[str, Any] = job.model_dump(mode="json")
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        section, name = key.split(".")
        (chosen if section == "parallel" else data[section])[name] = value
    if chosen:
        kept: dict[str, Any] = {key: value for key, value in data["parallel"].items() if key in _KEPT}
        data["parallel"] = _with_kept(kept, chosen)
    try:
        spread = Job.model_validate(data)
    except ValidationError as error:
        return Candidate(values, None, str(error.errors()[0]["msg"]).removeprefix("Value error, "))
    try:
        spread.parallel.axes(world)
        microbatches_per_step(
            spread.train.microbatches, global_batch=spread.train.global_batch, world=world, parallel=spread.parallel
        )
    except JobError as error:
        return Candidate(values, None, _sentence(error))
    problems = check_job(spread, world=world)
    return Candidate(values, spread, "; ".join(problem.what for problem in problems))


def _with_kept(kept: Mapping[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """``chosen`` with what the job says beside it, as far as the two go together."""
    for key, value in kept.items():
        try:
            Parallel.model_validate(chosen | {key: value})
        except ValidationError:
            continue
        chosen = chosen | {key: value}
    return chosen


def _sentence(error: JobError) -> str:
    problem = error.problems[0]
    return f"{problem.what} ({problem.hint})" if problem.hint else problem.what


def _meshes(world: int, per_node: int) -> Iterator[dict[str, Any]]:
    """Dotted keys and values. Tensor groups stay within a node, whose links they need."""
    yield {"parallel.strategy": "ddp"}
    if world == 1:
        return
    nodes = world // per_node
    for stage in (1, 2, 3):
        yield {"parallel.strategy": f"zero{stage}"}
    yield {"parallel.strategy": "fsdp"}
    if nodes > 1 and per_node > 1:
        yield {"parallel.strategy": "fsdp", "parallel.replicas": nodes}
    for strategy in ("ddp", "fsdp"):
        for tensor in _powers(per_node):
            yield {"parallel.strategy": strategy, "parallel.tensor": tensor}
    for strategy in ("ddp", "fsdp"):
        for pipeline in _powers(min(world, _DEEPEST)):
            yield {"parallel.strategy": strategy, "parallel.pipeline": pipeline}
            if per_node > 1 and pipeline * per_node <= world:
                yield {
                    "parallel.strategy": strategy,
                    "parallel.tensor": per_node,
                    "parallel.pipeline": pipeline,
                }


def _powers(most: int) -> Iterator[int]:
    size = 2
    while size <= most:
        yield size
        size *= 2
