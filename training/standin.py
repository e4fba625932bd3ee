"""A small world or a shallow model in the place of a large one, for dry runs; and the way back to the large one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..core.job import Job
from ..core.parallel import microbatches_per_step
from ..strategies.ledger import KINDS, Rates, Section

_COPIES = 3  # of a model that is cut over some ranks each; no other group has as many ranks


@dataclass(frozen=True)
class Device:
    """What ranks compute on.

    Attributes:
        rates: its speed.
        gpu: whether it is one; then optimizers update many weights at once, as torch has it there.
        fused: number formats for which attention has a kernel that keeps no matrix of scores: "half", "full".
        grouped: those of them for which it takes fewer key heads than query heads.
    """

    rates: Rates
    gpu: bool
    fused: tuple[str, ...] = ()
    grouped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One field of a sample: its shape, and its type as torch calls it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Setting:
    """Which rank is followed, and in what world.

    Attributes:
        world: ranks.
        rank: the one that is followed.
        per_node: ranks on each node.
        samples: what a sample consists of, by field.
        evaluated: samples in one forward pass of an evaluation; 0 for none.
        device: what it computes on.
    """

    world: int
    rank: int
    per_node: int
    samples: Mapping[str, Sample]
    evaluated: int
    device: Device


@dataclass
class Course:
    """The books of a dry run: each section, and how often it is repeated in a whole step; bytes held between steps."""

    sections: list[tuple[Section, float]]
    held: list[float]

    def peak(self) -> float:
        """Bytes of the moment when most were held."""
        return max(sum(section.peak) for section, _ in self.sections)

    def scaled(self, share: float) -> Course:
        """Where a rank holds ``share`` as much of what is cut over ranks, which an optimizer works on alone."""
        cut = ("weights", "gradients", "optimizer")

        def times(peak: list[float], *, whole: bool = False) -> list[float]:
            pairs = zip(peak, KINDS, strict=True)
            return [size * (share if whole or kind in cut else 1.0) for size, kind in pairs]

        sections = [
            (replace(section, peak=times(section.peak, whole=section.name == "optimizer")), count)
            for section, count in self.sections
        ]
        return Course(sections, times(self.held))


def along(first: Course, second: Course, distance: float) -> Course | None:
    """The course that lies ``distance`` times their difference beyond the second; None where they differ in form."""
    if [section.name for section, _ in first.sections] != [section.name for section, _ in second.sections]:
        return None

    def line(a: float, b: float) -> float:
        return max(0.0, b + (b - a) * distance)

    def lines(a: Mapping[tuple[str, int, int], float], b: Mapping[tuple[str, int, int], float]):
        return {key: line(a.get(key, 0.0), b.get(key, 0.0)) for key in a.keys() | b.keys()}

    sections: list[tuple[Section, float]] = []
    for (a, times), (b, _) in zip(first.sections, second.sections, strict=True):
        peak = [line(x, y) for x, y in zip(a.peak, b.peak, strict=True)]
        seconds, flops = line(a.seconds, b.seconds), line(a.flops, b.flops)
        sections.append(
            (Section(a.name, peak, seconds, flops, lines(a.sent, b.sent), lines(a.messages, b.messages)), times)
        )
    return Course(sections, [line(x, y) for x, y in zip(first.held, second.held, strict=True)])


@dataclass(frozen=True)
class StandIn:
    """A job in a world that is followed in the place of another.

    Attributes:
        job: with as many samples and microbatches on each data-parallel rank.
        setting: of the world that is followed.
        groups: for numbers of ranks in it the group that they stand for: its ranks, and the nodes that it spans.
    """

    job: Job
    setting: Setting
    groups: Mapping[int, tuple[int, int]]

    def renamed(self, course: Course) -> Course:
        """What was sent, by the groups of the large world, in whose rings each rank sends a little more."""
        if not self.groups:
            return course
        for section, _ in course.sections:
            sent, messages = dict(section.sent), dict(section.messages)
            section.sent.clear()
            section.messages.clear()
            for (kind, ranks, nodes), size in sent.items():
                group = self.groups.get(ranks, (ranks, nodes)) if kind != "point" else (ranks, nodes)
                more = (1 - 1 / group[0]) / (1 - 1 / ranks) if ranks > 1 else 1.0
                key = (kind, *group)
                section.sent[key] = section.sent.get(key, 0.0) + size * more
                section.messages[key] = section.messages.get(key, 0.0) + messages[kind, ranks, nodes]
        return course


def same(job: Job, setting: Setting) -> StandIn:
    """The job in its own world."""
    return StandIn(job, setting, {})


def fewer(job: Job, setting: Setting, shards: int) -> StandIn:
    """As :func:`same`, with only ``shards`` ranks that share out each copy of the model."""
    parallel, train = job.parallel, job.train
    axes = parallel.axes(setting.world)
    count = microbatches_per_step(
        train.microbatches, global_batch=train.global_batch, world=setting.world, parallel=parallel
    )
    own, samples = count // axes["data"], -(-train.global_batch // count)
    replicas = min(parallel.replicas, _COPIES)
    data = shards * replicas
    world = data * parallel.tensor * parallel.pipeline
    small = job.model_copy(
        update={
            "parallel": parallel.model_copy(update={"replicas": replicas}),
            "train": train.model_copy(update={"global_batch": samples * own * data, "microbatches": own * data}),
        }
    )
    stage = setting.rank // (setting.world // parallel.pipeline)
    real = axes["data"] // parallel.replicas

    def group(ranks: int, stride: int) -> tuple[int, int]:
        nodes = len({rank * stride // setting.per_node for rank in range(ranks)})
        return ranks, nodes

    groups = {shards: group(real, parallel.tensor), data: group(axes["data"], parallel.tensor)}
    if replicas > 1:
        groups[replicas] = group(parallel.replicas, real * parallel.tensor)
    return StandIn(small, replace(setting, world=world, rank=stage * (world // parallel.pipeline)), groups)
