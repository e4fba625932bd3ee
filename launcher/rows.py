"""One row of a plan: what a way to spread a job takes, from the footprints of its ranks, and what would make it fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..core.job import Job
from ..core.parallel import microbatches_per_step
from .candidates import Candidate, with_values
from .dryruns import DryRuns
from .hardware import Machines
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
_ROUNDS = 4
_HELPLESS = frozenset(("build", "optimizer"))  # phases in which nothing but another way takes less


@dataclass(frozen=True)
class Row:
    """One way to spread the job.

    Attributes:
        values: what it says, by dotted key; empty for the job as it stands.
        mesh: sizes of the mesh's axes.
        state: "fits", "too large", "refused", or "left out".
        reason: why it does not fit, is refused, or was not looked at.
        memory: bytes of the rank that takes most by what they are for, at the moment when it takes most; the reserve
            and the margin are among them.
        phase: what it does at that moment.
        over: the phases in which it takes too much.
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
    over: frozenset[str] = frozenset()
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


class Look:
    """Looks at ways to spread one job."""

    def __init__(self, job: Job, machines: Machines, facts: Mapping[str, Any], runs: DryRuns) -> None:
        self._job, self._machines, self._facts, self._runs = job, machines, facts, runs

    def at(self, ways: Sequence[Candidate]) -> list[Row]:
        """A row for each; one that does not fit is tried with less to keep, as far as the job leaves that open."""
        rows = self._rows(ways)
        open_ = set(range(len(rows)))
        for _ in range(_ROUNDS):
            again = [(index, eased) for index in sorted(open_) if (eased := self._eased(rows[index])) is not None]
            open_.clear()
            for (index, _), row in zip(again, self._rows([way for _, way in again]), strict=True):
                if row.state == "fits" or (row.state == "too large" and row.total < rows[index].total):
                    rows[index] = row
                    open_.add(index)
        return rows

    def _eased(self, row: Row) -> Candidate | None:
        """A way that does not fit with what may help in the phases that take too much; None where nothing may."""
        if row.state != "too large" or not row.values or not row.over or row.over & _HELPLESS:
            return None
        train, values = self._job.train, dict(row.values)
        if "evaluate" in row.over and row.microbatch < values.get("train.evaluate_batch", train.evaluate_batch):
            values["train.evaluate_batch"] = row.microbatch  # few samples at a time
        if row.over & {"forward", "backward"}:
            if self._facts["units"] and not train.recompute and "train.recompute" not in values:
                values["train.recompute"] = True
            elif train.microbatches == "auto" and row.microbatch > 1:
                values["train.microbatches"] = train.global_batch  # one sample in each
        if values == row.values:
            return None
        machines = self._machines
        way = with_values(self._job, values, nodes=machines.nodes, per_node=machines.per_node)
        return way if way.job is not None and not way.reason else None

    def at_a_glance(self, way: Candidate) -> Row | None:
        """The row of a way that arithmetic refuses, or finds too large."""
        return self._row(way, ()) if way.job is None or way.reason else self._least(way)

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
        phases = [(phase, memory) for answer in answers for phase, memory in self._memory(answer).items()]
        over = frozenset(phase for phase, memory in phases if sum(memory.values()) > machines.memory)
        # of a way that nothing can help what cannot be helped
        worst = over & _HELPLESS if way.values else frozenset[str]()
        phase, memory = max((p for p in phases if not worst or p[0] in worst), key=lambda p: sum(p[1].values()))
        held: Mapping[str, float] = max((a["held"] for a in answers), key=lambda held: sum(held.values()))
        times = [
            (
                step_time(answer["seconds"], _sent(answer), machines.gpu, parallel, microbatches=own),
                i,
            )
            for i, answer in enumerate(answers)
        ]
        time, slowest = max(times, key=lambda pair: pair[0].total)
        reason = f"{size(sum(memory.values()))} of {size(machines.memory)}, {_WHILE[phase]}" if over else ""
        return Row(
            way.values,
            "too large" if over else "fits",
            reason,
            mesh=axes,
            memory=memory,
            phase=phase,
            over=over,
            held={name: held[name] for name in ("weights", "gradients", "optimizer")},
            microbatch=-(-train.global_batch // count),
            microbatches=own,
            time=time,
            sent=_sent(answers[slowest]),
            flops=sum(answer["flops"] for answer in answers) / len(answers) * machines.world,
        )

    def _memory(self, answer: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """By phase, bytes by what they are for."""
        peaks: dict[str, dict[str, float]] = answer["peaks"]
        held: dict[str, float] = answer["held"]
        is_cpu = self._machines.gpu.is_cpu
        found: dict[str, dict[str, float]] = {}
        for phase, peak in peaks.items():
            found[phase] = kinds = dict(peak)
            kinds["activations"] = kinds.pop("other")
            if is_cpu:  # snapshots are copies in the same memory
                kinds["snapshot"] = held["weights"] + held["optimizer"]
            kinds["margin"] = MARGIN * sum(kinds.values())
            kinds["reserve"] = CPU_RESERVE if is_cpu else GPU_RESERVE
        return found


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
