"""The ways to spread a job that a plan looks at: pure arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from ..core.checks import check_job
from ..core.elastic import legal_nodes, settled
from ..core.errors import JobError
from ..core.job import Job
from ..core.parallel import Parallel, microbatches_per_step

_DEEPEST = 16  # stages; more are seldom worth their bubble
_ZERO = ("zero1", "zero2", "zero3")
_KEPT = ("bucket_mb", "deepspeed", "offload", "compress", "pipeline_schedule", "pipeline_chunks", "reduce", "reshard")


@dataclass(frozen=True)
class Candidate:
    """One way to spread the job.

    Attributes:
        values: what it says, by dotted key of the job; empty for the job as it stands.
        job: the job with these values on so many nodes; None where they contradict each other.
        reason: why it cannot be, if it cannot.
        sizes: the numbers of nodes that it could have, where the job's number may change.
    """

    values: Mapping[str, Any]
    job: Job | None
    reason: str = ""
    sizes: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """How involved it is: 0 for ddp and fsdp, 1 with several sharded copies and for ZeRO, 2 with tensor groups, 3
        with pipelines."""
        if self.values.get("parallel.pipeline", 1) > 1:
            return 3
        if self.values.get("parallel.tensor", 1) > 1:
            return 2
        return 1 if len(self.values) > 1 or self.values.get("parallel.strategy", "") in _ZERO else 0


def candidates(job: Job, *, nodes: int, per_node: int) -> list[Candidate]:
    """Ways to spread ``job`` over ``per_node`` ranks on each of ``nodes`` nodes, the simplest first.

    Where the number of nodes may change, a way must allow all numbers that the simplest allows.
    """
    meshes = _meshes(nodes * per_node, per_node)
    if job.parallel.is_open:
        meshes = _beside(job.parallel, meshes)
    ways = [with_values(job, values, nodes=nodes, per_node=per_node) for values in meshes]
    wanted = next((way.sizes for way in ways if way.sizes), ())
    return [_at_all(way, wanted) for way in ways]


def _at_all(way: Candidate, wanted: tuple[int, ...]) -> Candidate:
    missing = [str(nodes) for nodes in wanted if nodes not in way.sizes]
    if way.reason or not missing:
        return way
    return replace(way, reason=f"it cannot be dealt to {' or '.join(missing)} nodes, which the run may come to have")


def with_values(job: Job, values: Mapping[str, Any], *, nodes: int, per_node: int) -> Candidate:
    """``job`` with ``values``, checked as far as arithmetic goes."""
    world = nodes * per_node
    try:
        spread = applied(job, {**values, "resources.nodes": nodes, "resources.nproc_per_node": per_node})
    except ValidationError as error:
        return Candidate(values, None, str(error.errors()[0]["msg"]).removeprefix("Value error, "))
    try:
        spread = settled(spread, per_node)
        spread.parallel.axes(world)
        microbatches_per_step(
            spread.train.microbatches, global_batch=spread.train.global_batch, world=world, parallel=spread.parallel
        )
        sizes = legal_nodes(spread, per_node) if job.recovery.node_range else ()
    except JobError as error:
        return Candidate(values, None, _sentence(error))
    problems = check_job(spread)
    return Candidate(values, spread, "; ".join(problem.what for problem in problems), sizes)


def applied(job: Job, values: Mapping[str, Any]) -> Job:
    """``job`` with values by dotted key.

    Where its strategy is open, what it says beside that holds; else what does not go with another one is left out.

    Raises:
        ValidationError: the values contradict each other.
    """
    data: dict[str, Any] = job.model_dump(mode="json")
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        section, name = key.split(".")
        (chosen if section == "parallel" else data[section])[name] = value
    if job.parallel.is_open:
        data["parallel"] |= chosen
    elif chosen:
        kept: dict[str, Any] = {key: value for key, value in data["parallel"].items() if key in _KEPT}
        data["parallel"] = _with_kept(kept, chosen)
    return Job.model_validate(data)


def _beside(parallel: Parallel, meshes: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The meshes without what ``parallel`` says itself, each once."""
    fixed = {f"parallel.{name}" for name in ("tensor", "pipeline", "replicas") if getattr(parallel, name) > 1}
    seen: list[dict[str, Any]] = []
    for mesh in meshes:
        rest = {key: value for key, value in mesh.items() if key not in fixed}
        if rest not in seen:
            seen.append(rest)
            yield rest


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
    yield {"parallel.strategy": "fsdp"}
    if nodes > 1 and per_node > 1:
        yield {"parallel.strategy": "fsdp", "parallel.replicas": nodes}
    for strategy in _ZERO:
        yield {"parallel.strategy": strategy}
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
