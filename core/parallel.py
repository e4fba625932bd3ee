"""Mesh arithmetic as a value: which axes a world of ranks has. No torch, no GPU."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import JobError, Problem


class Parallel(BaseModel):
    """How a job is spread over ranks; validates itself against a world size by arithmetic alone."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3", "auto"] = "ddp"
    """'ddp': every rank holds the whole model, gradients are averaged (torch DistributedDataParallel). 'fsdp': weights,
    gradients and the optimizer's state are cut over the ranks, and the weights of one unit of the model at a time are
    gathered where they are needed (torch FSDP2). DeepSpeed's ZeRO (needs the 'deepspeed' extra) deals to the ranks:
    'zero1' the optimizer's state, 'zero2' the gradients too, 'zero3' the weights too. With 'auto' dltrain launch takes
    the first choice of dltrain plan for the nodes that it has; what else is said here holds."""
    tensor: int = Field(default=1, gt=0)
    """Neighbouring ranks that compute the same microbatches together, each with its share of the model's matrices
    (tensor parallelism, by the rules of the recipe's layout). The others are data-parallel."""
    pipeline: int = Field(default=1, gt=0)
    """Groups of ranks that hold one stage of the model each, its submodules cut into as many runs (by the recipe's
    layout); microbatches pass through them one after another (pipeline parallelism)."""
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    """pipeline: in which order a stage works. 'gpipe': all forward passes of a step, then all backward passes. '1f1b':
    forward and backward in turn, so that a stage keeps the activations of as many microbatches as there are stages at
    most. 'interleaved': as that, with several shorter stages on each rank, which wait less and send more."""
    pipeline_chunks: int = Field(default=2, gt=1)
    """pipeline_schedule 'interleaved': stages on each rank."""
    sequence: bool = False
    """tensor: also cut what lies between those matrices, along the sequence, by the rules of the recipe's layout. Takes
    less memory for activations; sequences must divide evenly."""
    bucket_mb: float = Field(default=25.0, gt=0)
    """ddp: size of the gradient buckets whose all-reduce overlaps with backward, in MiB. zero1, zero2 and zero3 take it
    where the DeepSpeed configuration says nothing of it."""
    static_graph: bool = False
    """ddp: promise that every step uses the same parameters in the same order, so that fewer checks are made. With more
    than two ranks, the first step after every start is rounded in another way than it would have been."""
    compress: Literal["none", "bf16", "powersgd"] = "none"
    """ddp: send gradients as bfloat16, or as matrices of low rank (PowerSGD). Both lose precision: the numbers differ
    from those of one process. A resumed run begins PowerSGD's memory of past errors anew."""
    powersgd_rank: int = Field(default=1, gt=0)
    """Rank of PowerSGD's matrices: a higher one loses less, and sends more."""
    powersgd_start: int = Field(default=100, ge=2)
    """Optimizer steps with whole gradients before PowerSGD begins, after every start."""
    replicas: int = Field(default=1, gt=0)
    """fsdp: copies of the model. Each is cut over the ranks of its own, and gradients are averaged over the copies
    (hybrid sharding); with one copy per node, weights are gathered within the node only."""
    reshard: bool = True
    """fsdp: free a unit's gathered weights after forward and gather them again for backward; false keeps them."""
    reduce: Literal["step", "microbatch"] = "step"
    """fsdp: when gradients are reduced. 'step': with the last microbatch, so that each rank keeps whole gradients until
    then. 'microbatch': every time, so that it keeps its shards only, at the price of more bytes sent."""
    offload: Literal["none", "cpu"] = "none"
    """fsdp and zero1, zero2, zero3: where the optimizer's state is kept and its updates are carried out, and with fsdp
    and zero3 the weights' pieces too: on the rank's device, or in the host's memory."""
    deepspeed: str | None = None
    """zero1, zero2, zero3: path of a DeepSpeed configuration (JSON), such as bucket sizes. What it says of the batch,
    the optimizer, the precision and the like must be what the job says."""

    @model_validator(mode="after")
    def _options_fit_the_strategy(self) -> Self:
        if self.is_open:
            return self  # what they do not fit is not chosen
        plain_ddp = self.strategy == "ddp" and self.tensor == self.pipeline == 1
        for name in ("static_graph", "compress"):
            if not plain_ddp and self._is_set(name):
                raise ValueError(f"'{name}' is for the strategy 'ddp' without 'tensor' and 'pipeline'")
        if not plain_ddp and not self.zero_stage and self._is_set("bucket_mb"):
            where = "the strategy 'ddp' without 'tensor' and 'pipeline'"
            raise ValueError(f"'bucket_mb' is for {where}, and for zero1, zero2, zero3")
        if self.sequence and self.tensor == 1:
            raise ValueError("'sequence' needs 'tensor' above 1")
        for name in ("replicas", "reshard", "reduce"):
            if self.strategy != "fsdp" and self._is_set(name):
                raise ValueError(f"'{name}' is for the strategy 'fsdp'")
        if self.strategy == "ddp" and self._is_set("offload"):
            raise ValueError("'offload' is for the strategies fsdp, zero1, zero2 and zero3")
        if not self.zero_stage and self._is_set("deepspeed"):
            raise ValueError("'deepspeed' is for the strategies zero1, zero2 and zero3")
        if self.zero_stage and self.tensor > 1:
            raise ValueError("'tensor' is for the strategies ddp and fsdp")
        if self.zero_stage and self.pipeline > 1:
            raise ValueError("'pipeline' is for the strategies ddp and fsdp; fsdp shares out what ZeRO does")
        if self.pipeline == 1 and self._is_set("pipeline_schedule"):
            raise ValueError("'pipeline_schedule' needs 'pipeline' above 1")
        if self._is_set("pipeline_chunks") and (self.pipeline == 1 or self.pipeline_schedule != "interleaved"):
            raise ValueError("'pipeline_chunks' is for pipeline_schedule 'interleaved'")
        for name in ("powersgd_rank", "powersgd_start"):
            if self.compress != "powersgd" and self._is_set(name):
                raise ValueError(f"'{name}' is for compress 'powersgd'")
        return self

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) != type(self).model_fields[name].default

    @property
    def is_open(self) -> bool:
        """Whether the strategy is still to be chosen."""
        return self.strategy == "auto"

    @property
    def cuts_weights(self) -> bool:
        """Whether a rank holds a share of the weights only, so that an update rule cannot look at all of them."""
        return self.strategy != "ddp" or self.tensor > 1 or self.pipeline > 1

    @property
    def stages(self) -> int:
        """Into how many stages the model is cut."""
        return self.pipeline * (self.pipeline_chunks if self.pipeline_schedule == "interleaved" else 1)

    @property
    def deals_weights(self) -> bool:
        """Whether a model is dealt to the ranks while it is built: a rank will hold a share of every weight anyway."""
        return self.strategy in ("fsdp", "zero3") and self.tensor == self.pipeline == 1

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 for other strategies."""
        return {"zero1": 1, "zero2": 2, "zero3": 3}.get(self.strategy, 0)

    def axes(self, world: int) -> dict[str, int]:
        """The device mesh of ``world`` ranks, outermost axis first; the sizes multiply to ``world``.

        Raises:
            JobError: ``world`` is not positive, or cannot be dealt to the axes evenly.
        """
        if world < 1:
            raise JobError(Problem(f"a world needs at least one rank, not {world}", "resources"))
        if world % self.pipeline:
            what = f"{world} ranks cannot be dealt to {self.pipeline} stages"
            raise JobError(Problem(what, "parallel.pipeline", f"{nearest_divisor(world, self.pipeline)} would do"))
        left = world // self.pipeline
        if left % self.tensor:
            what = f"{left} ranks cannot be dealt to groups of {self.tensor}"
            raise JobError(Problem(what, "parallel.tensor", f"{nearest_divisor(left, self.tensor)} would do"))
        data = left // self.tensor
        if data % self.replicas:
            what = f"{data} data-parallel ranks cannot be dealt to {self.replicas} replicas"
            raise JobError(Problem(what, "parallel.replicas", f"{nearest_divisor(data, self.replicas)} would do"))
        return {"pipeline": self.pipeline, "data": data, "tensor": self.tensor}

    def place(self, rank: int, world: int) -> dict[str, int]:
        """Where ``rank`` stands on each of the :meth:`axes`, the last of which varies fastest."""
        found: dict[str, int] = {}
        for name, size in reversed(self.axes(world).items()):
            rank, found[name] = divmod(rank, size)
        return found

    def counts(self, rank: int, world: int) -> bool:
        """Whether the losses and metrics of ``rank`` count: one rank's of those that compute the same samples.

        It is in the last stage, which is the one that has them.
        """
        place = self.place(rank, world)
        return place["pipeline"] == self.pipeline - 1 and place["tensor"] == 0


def nearest_divisor(number: int, near: int) -> int:
    """The divisor of ``number`` that is nearest to ``near``; the smaller of two."""
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: (abs(d - near), d))


def microbatches_per_step(
    microbatches: int | Literal["auto"], *, global_batch: int, world: int, parallel: Parallel
) -> int:
    """Microbatches of one optimizer step over all ranks, dealt evenly to the data-parallel ranks.

    'auto' is one for each data-parallel rank, and with a pipeline as many as it has ranks, so that each has one.

    Raises:
        JobError: they cannot be dealt evenly, the pipeline's schedule does not take as many, or a microbatch would be
            empty in every step.
    """
    data = parallel.axes(world)["data"]
    count = data * parallel.pipeline if microbatches == "auto" else microbatches
    if count % data:
        near = max(data, round(count / data) * data)
        raise JobError(
            Problem(
                f"{count} microbatches cannot be dealt evenly to {data} ranks",
                "train.microbatches",
                f"{near} would do",
            )
        )
    _check_schedule(count, data, parallel)
    if count > global_batch:
        raise JobError(
            Problem(
                f"a global batch of {global_batch} cannot be cut into {count} microbatches",
                "train.global_batch",
                f"use at least {count}, or fewer ranks",
            )
        )
    return count


def _check_schedule(count: int, data: int, parallel: Parallel) -> None:
    """What torch's schedules ask of the number of microbatches that one data-parallel rank has in a step."""
    own, ranks = count // data, parallel.pipeline
    if ranks == 1 or parallel.pipeline_schedule == "gpipe":
        return
    if own < ranks and parallel.pipeline_schedule == "1f1b":
        what = f"{count} microbatches are {own} for each pipeline, fewer than its {ranks} stages"
        hint = f"{ranks * data} would do, or parallel.pipeline_schedule: gpipe"
        raise JobError(Problem(what, "train.microbatches", hint))
    rounds = max(1, own // ranks)
    if parallel.pipeline_schedule == "interleaved" and own % rounds:
        what = f"{own} microbatches for each pipeline cannot be dealt evenly to {rounds} rounds of {ranks} stages"
        raise JobError(Problem(what, "train.microbatches", f"{rounds * ranks * data} would do"))
