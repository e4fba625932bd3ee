"""What a job would take on machines that need not be there: for each way to spread it whether it fits, and how fast.

The bytes are those of the job's own engine, followed on tensors without memory (``training/dryrun.py``). Here it is
decided what is looked at, and which comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.errors import JobError, Problem
from ..core.job import Job
from .candidates import Candidate, candidates, with_values
from .dryruns import DryRuns
from .hardware import Machines
from .machine import usable_cpus
from .rows import Look, Row, label
from .steptime import MATRIX

#: Ways count as equally fast that differ by less than this share or these seconds: what the engines' own code takes is
#: not modelled. On two CPU ranks zero1 takes 10 ms more than ddp, and zero2 20 (docs/benchmarks.md).
_CLOSE, _BLUR = 0.1, 0.01
_LEVELS = ("ways", "more ways", "ways with tensor groups", "ways with pipelines")


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Plan:
    """The answer: rows in the order of preference, those that fit first.

    Attributes:
        job: the job that was asked about.
        machines: where.
        parameters: of the model.
        weights: bytes of its weights.
        samples: of the training part.
        rows: the ways to spread it.
        skipped: ways that were not looked at.
    """

    job: Job
    machines: Machines
    parameters: int
    weights: int
    samples: int
    rows: Sequence[Row]
    skipped: int

    @property
    def best(self) -> Row | None:
        """The first that fits."""
        return next((row for row in self.rows if row.state == "fits"), None)

    @property
    def closest(self) -> Row | None:
        """Of those that do not fit the one that takes least."""
        large = [row for row in self.rows if row.state == "too large"]
        return min(large, key=lambda row: row.total, default=None)


def make_plan(
    job: Job,
    machines: Machines,
    *,
    everything: bool = False,
    briefly: bool = False,
    said: Callable[[str], None] = print,
    meanwhile: Callable[[], None] = _nothing,
) -> Plan:
    """Look at the ways to spread ``job`` over ``machines``, and at the job as it stands if it names a strategy.

    Args:
        everything: also look at what cannot be notably faster, and at tensor groups and pipelines where simpler ways
            fit.
        briefly: look at no more than is needed to know the first choice.
        said: is told what is being looked at.
        meanwhile: called while answers are waited for; what it raises ends that.

    Raises:
        JobError: the job's data or recipe are wrong.
        RunFailed: a process that followed a step died, or took too long.
    """
    with DryRuns(min(4, usable_cpus()), meanwhile) as runs:
        said("building the model and opening the data")
        facts = runs.result(runs.ask({"ask": "look", "job": job.model_dump(mode="json")}))
        if "problems" in facts:
            raise JobError(*(Problem(**problem) for problem in facts["problems"]))
        look = Look(job, machines, facts, runs)
        ways = candidates(job, nodes=machines.nodes, per_node=machines.per_node)
        if not job.parallel.is_open:
            own = with_values(job, {}, nodes=machines.nodes, per_node=machines.per_node)
            ways = [own, *(way for way in ways if not _same(way, job))]
        rows: list[Row] = []
        if briefly and not ways[0].reason:
            rows += look.at([ways.pop(0)])
        skipped = 0
        for depth, name in enumerate(_LEVELS):
            level = [way for way in ways if way.depth == depth]
            fits = any(row.state == "fits" for row in rows)
            if (briefly and _is_unbeaten(rows, job, machines)) or (depth > 1 and fits and not everything):
                skipped += len(level)
                continue
            first = None if everything or depth != 1 else _unbeatable(rows, job)
            if first is not None:
                rows += [look.at_a_glance(way) or _left_out(way, first) for way in level]
            elif level:
                said(f"following a step in {len(level)} {name}")
                rows += look.at(level)
    parameters, weights = facts["parameters"], facts["bytes"]
    return Plan(job, machines, parameters, weights, facts["counts"]["train"], _in_order(rows), skipped)


def _same(way: Candidate, job: Job) -> bool:
    return way.job is not None and way.job.parallel == job.parallel


def _near(fastest: float) -> float:
    """Seconds of a step up to which a way counts as fast as the fastest."""
    return fastest * (1 + _CLOSE) + _BLUR


def _is_unbeaten(rows: Sequence[Row], job: Job, machines: Machines) -> bool:
    """Whether nothing can come before the simplest way, the only one so far: all compute at least the same products."""
    if len(rows) != 1 or rows[0].time is None or rows[0].state != "fits":
        return False
    gpu = machines.gpu
    rate = gpu.full if job.train.precision == "fp32" else max(gpu.half, gpu.full)
    return rows[0].time.total <= _near(rows[0].flops / machines.world / (rate * MATRIX))


def _unbeatable(rows: Sequence[Row], job: Job) -> Row | None:
    """The first of those that fit, if it comes before all others that share out no more than fsdp, whatever they send.

    A rank of these computes what one of fsdp does.
    """
    fits = [row for row in _in_order(rows) if row.state == "fits"]
    own = job.parallel.strategy
    shared = [row for row in fits if row.values.get("parallel.strategy", own) == "fsdp"]
    computing = [row.time.computing for row in shared if row.time is not None]
    if not computing or fits[0].time is None or fits[0].time.total > _near(min(computing)):
        return None
    return fits[0]


def _left_out(way: Candidate, first: Row) -> Row:
    name = label(first.values) if first.values else "the job"
    return Row(way.values, "left out", f"not looked at, as it cannot be notably faster than {name}: --all does")


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """Those that fit, of the fastest the simplest first and the others by their time; then what is too large, by what
    it takes; then what cannot be. ``rows`` come by how simple they are."""
    fits = [(row, row.time.total) for row in rows if row.state == "fits" and row.time is not None]
    near = _near(min((time for _, time in fits), default=0.0))
    fits.sort(key=lambda pair: 0.0 if pair[1] <= near else pair[1])
    large = sorted((row for row in rows if row.state == "too large"), key=lambda row: row.total)
    return [*(row for row, _ in fits), *large, *(row for row in rows if row.state in ("left out", "refused"))]
