"""Which numbers of nodes a job can train on, with the same numbers on each of them. No torch, no Ray."""

from __future__ import annotations

from .errors import JobError
from .job import Job
from .parallel import microbatches_per_step


def settled(job: Job, ranks_per_node: int) -> Job:
    """The job with as many microbatches at every number of nodes as it has at the most.

    They settle which samples are summed together, and what is drawn for each: with another number of them a run that
    has shrunk would compute something else. A job whose number of nodes is fixed is returned as it is.

    Raises:
        JobError: the job cannot be dealt to the most nodes.
    """
    if job.recovery.node_range is None or job.train.microbatches != "auto":
        return job
    world = job.recovery.node_range[1] * ranks_per_node
    count = microbatches_per_step("auto", global_batch=job.train.global_batch, world=world, parallel=job.parallel)
    return job.model_copy(update={"train": job.train.model_copy(update={"microbatches": count})})


def legal_nodes(job: Job, ranks_per_node: int) -> tuple[int, ...]:
    """The numbers of nodes, ascending, that the job may be spread over: within its range, and dealt evenly.

    Raises:
        JobError: as :func:`settled`.
    """
    least, most = job.recovery.node_range or (job.resources.nodes, job.resources.nodes)
    job = settled(job, ranks_per_node)
    return tuple(nodes for nodes in range(least, most + 1) if _fits(job, nodes * ranks_per_node))


def _fits(job: Job, world: int) -> bool:
    train = job.train
    try:
        microbatches_per_step(train.microbatches, global_batch=train.global_batch, world=world, parallel=job.parallel)
    except JobError:
        return False
    return True
