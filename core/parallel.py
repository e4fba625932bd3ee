"""Mesh arithmetic as a value: which axes a world of ranks has. No torch, no GPU."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import JobError, Problem


class Parallel(BaseModel):
    """How a job is spread over ranks; validates itself against a world size by arithmetic alone."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = "ddp"
    """'ddp': every rank holds the whole model, gradients are averaged (torch DistributedDataParallel). DeepSpeed's
    ZeRO (needs the 'deepspeed' extra) deals to the ranks: 'zero1' the optimizer's state, 'zero2' the gradients too,
    'zero3' the weights too."""
    bucket_mb: float = Field(default=25.0, gt=0)
    """Size of the buckets in which gradients are reduced during backward, in MiB. zero1, zero2 and zero3 take it where
    the DeepSpeed configuration says nothing of it."""
    offload: Literal["none", "cpu"] = "none"
    """Where zero1, zero2 and zero3 keep the optimizer's state and carry out its updates, and zero3 its weights too:
    on the rank's device, or in the host's memory."""
    deepspeed: str | None = None
    """Path of a DeepSpeed configuration (JSON) for zero1, zero2 and zero3, such as bucket sizes. What it says of the
    batch, the optimizer, the precision and the like must be what the job says."""

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 for other strategies."""
        return {"zero1": 1, "zero2": 2, "zero3": 3}.get(self.strategy, 0)

    def axes(self, world: int) -> dict[str, int]:
        """The device mesh of ``world`` ranks, outermost axis first; the sizes multiply to ``world``.

        Raises:
            JobError: ``world`` is not positive.
        """
        if world < 1:
            raise JobError(Problem(f"a world needs at least one rank, not {world}", "resources"))
        return {"data": world}


def microbatches_per_step(microbatches: int | Literal["auto"], *, global_batch: int, data: int) -> int:
    """Microbatches of one optimizer step over all ranks, dealt evenly to ``data`` data-parallel ranks.

    Raises:
        JobError: they cannot be dealt evenly, or a microbatch would be empty in every step.
    """
    count = data if microbatches == "auto" else microbatches
    if count % data:
        near = max(data, round(count / data) * data)
        raise JobError(
            Problem(
                f"{count} microbatches cannot be dealt evenly to {data} ranks",
                "train.microbatches",
                f"{near} would do",
            )
        )
    if count > global_batch:
        raise JobError(
            Problem(
                f"a global batch of {global_batch} cannot be cut into {count} microbatches",
                "train.global_batch",
                f"use at least {count}, or fewer ranks",
            )
        )
    return count
