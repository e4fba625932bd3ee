"""What a job would take on machines that need not be there: for each way to spread it whether it fits, and how fast.

The bytes are those of the job's own engine, followed on tensors without memory (``training/dryrun.py``). Here it is
decided what is looked at, and what the figures mean for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import JobError, Problem
from ..core.job import Job
from ..core.parallel import microbatches_per_step
from .candidates import Candidate, candidates, with_values
from .dryruns import DryRuns
from .hardware import Machines
from .machine import usable_cpus
from .steptime import LAUNCH, MATRIX, TRAFFIC, Sent, StepTime, step_time

_GIB = 2**30
#: Memory of a GPU that training cannot have: the CUDA context, cuBLAS's workspaces, NCCL's buffers.
GPU_RESERVE = int(1.5 * _GIB)
#: What kernels on a CPU, such as convolutions, take for themselves while they run.
WORKSPACE = 2**24
#: Memory of a rank without a GPU beside its tensors: that, and the interpreter with torch, as far as it is not shared.
CPU_RESERVE = int(0.3 * _GIB) + WORKSPACE
#: What is added to all tensors' bytes for the allocator's rounding and for holes between them.
MARGIN = 0.06
#: Ways count as equally fast that differ by less than this share or these seconds: what the engines' own code takes is
#: not modelled. On two CPU ranks zero1 takes 10 ms more than ddp, and zero2 20 (docs/benchmarks.md).
_CLOSE, _BLUR = 0.1, 0.01
_LEVELS = ("ways", "ways with tensor groups", "ways with pipelines")


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Row:
    """One way to spread the job.

    Attributes:
        values: what it says, by dotted key; empty for the job as it stands.
        mesh: sizes of the mesh's axes.
        state: "fits", "too large", or "refused".
        reason: why it does not fit, or is refused.
        memory: bytes of the rank that takes most by what they are for, at the moment when it takes most; the reserve
            and the margin are among them.
        phase: what it does at that moment.
        held: bytes of weights, gradients and optimizer state that each rank holds between steps.
        microbatch: samples in each microbatch.
        microbatches: of one step on one data-parallel rank.
        time: of a step.
        sent: what a rank sends in a step.
        flops: floating-point operations of all ranks in a step.
    """

    values: Mapping[str, Any]
    state: str
    reason: str = ""
    mesh: Mapping[str, int] = field(default_factory=dict[str, int])
    memory: Mapping[str, float] = field(default_factory=dict[str, float])
    phase: str = ""
    held: Mapping[str, float] = field(default_factory=dict[str, float])
    microbatch: int = 0
    microbatches: int = 0
    time: StepTime | None = None
    sent: Sequence[Sent] = ()
    flops: float = 0.0

    @property
    def total(self) -> float:
        """Bytes that a rank takes at most."""
        return sum(self.memory.values())

    @property
    def on_the_wire(self) -> float:
        """Bytes that a rank sends in a step."""
        return sum(item.size for item in self.sent)

    @property
    def between_nodes(self) -> float:
        """Those of them that groups of several nodes share."""
        return sum(item.size for item in self.sent if item.nodes > 1)


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
        everything: also look at tensor groups and pipelines where simpler ways fit.
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
        look = _Look(job, machines, facts, runs)
        ways = candidates(job, nodes=machines.nodes, per_node=machines.per_node)
        if not job.parallel.is_open:
            own = with_values(job, {}, nodes=machines.nodes, per_node=machines.per_node)
            ways = [own, *(way for way in ways if not _same(way, job))]
        rows: list[Row] = []
        if briefly and not ways[0].reason:
            rows += look.at([ways.pop(0)])
        if rows and _is_unbeaten(rows[0], job, machines):
            skipped = len(ways)
        else:
            skipped = look.further(ways, rows, everything=everything, said=said)
    parameters, weights = facts["parameters"], facts["bytes"]
    return Plan(job, machines, parameters, weights, facts["counts"]["train"], _in_order(rows), skipped)


def _same(way: Candidate, job: Job) -> bool:
    return way.job is not None and way.job.parallel == job.parallel


def _near(fastest: float) -> float:
    """Seconds of a step up to which a way counts as fast as the fastest."""
    return fastest * (1 + _CLOSE) + _BLUR


def _is_unbeaten(row: Row, job: Job, machines: Machines) -> bool:
    """Whether no other way, each of which computes at least the same products, can come before the simplest one."""
    if row.state != "fits" or row.time is None:
        return False
    gpu = machines.gpu
    rate = gpu.full if job.train.precision == "fp32" else max(gpu.half, gpu.full)
    return row.time.total <= _near(row.flops / machines.world / (rate * MATRIX))


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """Those that fit, of the fastest the simplest first and the others by their time; then what is too large, by what
    it takes; then what cannot be. ``rows`` come by how simple they are."""
    fits = [(row, row.time.total) for row in rows if row.state == "fits" and row.time is not None]
    near = _near(min((time for _, time in fits), default=0.0))
    fits.sort(key=lambda pair: 0.0 if pair[1] <= near else pair[1])
    large = sorted((row for row in rows if row.state == "too large"), key=lambda row: row.total)
    return [*(row for row, _ in fits), *large, *(row for row in rows if row.state == "refused")]


class _Look:
    """Looks at ways to spread one job."""

    def __init__(self, job: Job, machines: Machines, facts: Mapping[str, Any], runs: DryRuns) -> None:
        self._job, self._machines, self._facts, self._runs = job, machines, facts, runs

    def further(
        self, ways: Sequence[Candidate], rows: list[Row], *, everything: bool, said: Callable[[str], None]
    ) -> int:
        """Add rows, level by level, until one fits or ``everything`` was looked at; how many ways were not."""
        skipped = 0
        for depth, name in enumerate(_LEVELS):
            level = [way for way in ways if way.depth == depth]
            if depth and not everything and any(row.state == "fits" for row in rows):
                skipped += len(level)
            elif level:
                said(f"following a step in {len(level)} {name}")
                rows += self.at(level)
        return skipped

    def at(self, ways: Sequence[Candidate]) -> list[Row]:
        """A row for each; one that does not fit is tried with less to keep, if the job leaves that open."""
        rows = self._rows(ways)
        for ease in (self._smaller, self._recomputed, self._smallest):
            again = [(index, eased) for index, row in enumerate(rows) if (eased := ease(row)) is not None]
            for (index, _), row in zip(again, self._rows([way for _, way in again]), strict=True):
                if row.state == "fits" or (row.state == "too large" and row.total < rows[index].total):
                    rows[index] = row
        return rows

    def _eased(self, row: Row, values: Mapping[str, Any]) -> Candidate | None:
        if row.state != "too large" or not values.items() - row.values.items() or not row.values:
            return None
        machines = self._machines
        way = with_values(self._job, {**row.values, **values}, nodes=machines.nodes, per_node=machines.per_node)
        return way if way.job is not None and not way.reason else None

    def _smaller(self, row: Row) -> Candidate | None:
        """An evaluation that takes too much in few samples at a time."""
        if row.phase != "evaluate" or row.microbatch < 1:
            return None
        return self._eased(row, {"train.evaluate_batch": row.microbatch})

    def _recomputed(self, row: Row) -> Candidate | None:
        if self._job.train.recompute or not self._facts["units"]:
            return None
        return self._eased(row, {"train.recompute": True})

    def _smallest(self, row: Row) -> Candidate | None:
        """One sample in each microbatch."""
        if self._job.train.microbatches != "auto" or row.microbatch < 2:
            return None
        return self._eased(row, {"train.microbatches": self._job.train.global_batch})

    def _rows(self, ways: Sequence[Candidate]) -> list[Row]:
        asked = [(way, self._least(way), self._ask(way)) for way in ways]
        return [
            least or self._row(way, [self._runs.result(future) for future in futures]) for way, least, futures in asked
        ]

    def _least(self, way: Candidate) -> Row | None:
        """The row of a way whose weights alone are too large, which needs no following."""
        if way.job is None or way.reason:
            return None
        parallel, weights = way.job.parallel, self._facts["bytes"] / way.job.parallel.pipeline
        if parallel.deals_weights and self._machines.world > 1:
            return None
        whole = {"weights": weights}
        why = "when its weights are put there whole"
        if parallel.strategy == "ddp" and parallel.tensor == 1:
            whole["gradients"] = weights
            why = "with whole weights and gradients, before anything else"
        total = sum(whole.values())
        if total <= self._machines.memory:
            return None
        return Row(way.values, "too large", f"{size(total)} of {size(self._machines.memory)}, {why}", memory=whole)

    def _ask(self, way: Candidate) -> list[Future[dict[str, Any]]]:
        if way.job is None or way.reason or self._least(way) is not None:
            return []
        machines, gpu = self._machines, self._machines.gpu
        parallel = way.job.parallel
        axes = parallel.axes(machines.world)
        evaluated = min(way.job.train.evaluate_batch, self._facts["counts"].get("val", 0))
        rates = {
            "half": gpu.half * MATRIX if gpu.is_cpu or self._takes_half(way.job) else gpu.full * MATRIX,
            "full": gpu.full * MATRIX,
            "memory": gpu.bandwidth * TRAFFIC,
            "launch": LAUNCH,
        }
        fused = [] if gpu.is_cpu else ["half", "full"]
        grouped = ["half"] if gpu.generation >= 8 else []
        request = {
            "ask": "footprint",
            "job": way.job.model_dump(mode="json"),
            "world": machines.world,
            "per_node": machines.per_node,
            "samples": self._facts["samples"],
            "evaluated": evaluated,
            "device": {"rates": rates, "gpu": not gpu.is_cpu, "fused": fused, "grouped": grouped},
        }
        ranks = machines.world // axes["pipeline"]
        stages = sorted({0, min(1, parallel.pipeline - 1), parallel.pipeline - 1})
        return [self._runs.ask({**request, "rank": stage * ranks}) for stage in stages]

    def _takes_half(self, job: Job) -> bool:
        return job.train.precision == "fp16" or self._machines.gpu.generation >= 8

    def _row(self, way: Candidate, answers: Sequence[Mapping[str, Any]]) -> Row:
        problems = [problem for answer in answers for problem in answer.get("problems", ())]
        if way.job is None or way.reason or problems:
            return Row(way.values, "refused", way.reason or _words(problems[0]))
        job, machines = way.job, self._machines
        parallel, train = job.parallel, job.train
        axes = parallel.axes(machines.world)
        count = microbatches_per_step(
            train.microbatches, global_batch=train.global_batch, world=machines.world, parallel=parallel
        )
        own = count // axes["data"]
        memory, phase, held = max(
            (self._memory(answer) for answer in answers), key=lambda found: sum(found[0].values())
        )
        times = [
            (
                step_time(answer["seconds"], _sent(answer), machines.gpu, parallel, microbatches=own),
                i,
            )
            for i, answer in enumerate(answers)
        ]
        time, slowest = max(times, key=lambda pair: pair[0].total)
        total = sum(memory.values())
        fits = total <= machines.memory
        reason = "" if fits else f"{size(total)} of {size(machines.memory)}, {_WHILE[phase]}"
        return Row(
            way.values,
            "fits" if fits else "too large",
            reason,
            mesh=axes,
            memory=memory,
            phase=phase,
            held=held,
            microbatch=-(-train.global_batch // count),
            microbatches=own,
            time=time,
            sent=_sent(answers[slowest]),
            flops=sum(answer["flops"] for answer in answers) / len(answers) * machines.world,
        )

    def _memory(self, answer: Mapping[str, Any]) -> tuple[dict[str, float], str, dict[str, float]]:
        """Bytes by what they are for, at the phase that takes most; that phase; what is held between steps."""
        peaks: dict[str, dict[str, float]] = answer["peaks"]
        phase = max(peaks, key=lambda name: sum(peaks[name].values()))
        found = dict(peaks[phase])
        found["activations"] = found.pop("other")
        held: dict[str, float] = answer["held"]
        if self._machines.gpu.is_cpu:  # snapshots are copies in the same memory
            found["snapshot"] = held["weights"] + held["optimizer"]
        found["margin"] = MARGIN * sum(found.values())
        found["reserve"] = CPU_RESERVE if self._machines.gpu.is_cpu else GPU_RESERVE
        return found, phase, {name: held[name] for name in ("weights", "gradients", "optimizer")}


_WHILE = {
    "build": "while it is built",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer's step",
    "evaluate": "in an evaluation",
}


def _sent(answer: Mapping[str, Any]) -> list[Sent]:
    found: list[tuple[tuple[str, int, int], float, float]] = answer["sent"]
    return [Sent(kind, ranks, nodes, size, messages) for (kind, ranks, nodes), size, messages in found if size >= 1]


def _words(problem: Mapping[str, str]) -> str:
    return f"{problem['what']} ({problem['hint']})" if problem["hint"] else problem["what"]


def label(values: Mapping[str, Any]) -> str:
    """What a way to spread a job says, in few words: ``"fsdp, replicas 2, recompute"``."""
    words: list[str] = []
    for key, value in values.items():
        name = key.rpartition(".")[2]
        words.append(str(value) if name == "strategy" else name if value is True else f"{name} {value}")
    return ", ".join(words)


def size(count: float) -> str:
    """Bytes for people, as GPUs' memory is counted: ``"79.1 GiB"``."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1024:,.1f} GiB"
