"""What a job that is to have the same bits on any number of ranks must say, and what it cannot have. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import Problem
from .job import Job


def check_numerics(job: Job) -> Iterator[Problem]:
    """What keeps a job of ``numerics: reproducible`` from it; nothing of other jobs."""
    if job.numerics != "reproducible":
        return
    yield from _spread(job)
    count = job.train.microbatches
    if count == "auto":
        what = "'auto' makes as many microbatches as there are ranks; numerics: reproducible needs a fixed number"
        yield Problem(what, "train.microbatches", "as many as the most ranks you will have would do, such as 8")
    elif count.bit_count() != 1:
        what = f"with numerics: reproducible {count} microbatches make no binary tree"
        yield Problem(what, "train.microbatches", f"a power of two would do, such as {1 << count.bit_length() - 1}")
    if job.train.compile:
        what = "torch.compile may choose kernels by how fast they are, which numerics: reproducible cannot have"
        yield Problem(what, "train.compile", "false would do")


def _spread(job: Job) -> Iterator[Problem]:
    """Ways to spread a job in which the number of ranks says in which order numbers are added up."""
    parallel = job.parallel
    if parallel.strategy != "ddp":
        what = f"{parallel.strategy} adds up gradients in an order of its own, which depends on the number of ranks"
        yield Problem(what, "parallel.strategy", "ddp would do, or numerics: fast")
    for name in ("tensor", "pipeline"):
        if getattr(parallel, name) > 1:
            what = f"numerics: reproducible needs whole copies of the model, and '{name}' cuts it"
            yield Problem(what, f"parallel.{name}", "1 would do, or numerics: fast")
    if parallel.compress != "none":
        what = f"'{parallel.compress}' rounds what ranks send each other, so more ranks round more often"
        yield Problem(what, "parallel.compress", "none would do, or numerics: fast")
    if parallel.static_graph:
        what = "numerics: reproducible does without DistributedDataParallel, whose checks 'static_graph' saves"
        yield Problem(what, "parallel.static_graph", "false would do")
