"""What a job says of training: ``train``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from .schema import word_detail
from .spec import Spec


class Optimizer(Spec):
    name: Literal["sgd", "adam", "adamw", "adafactor", "muon"] = "adamw"
    """The update rule. 'muon' orthogonalizes the updates of matrices; all other weights are left to adamw."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of the weights per unit learning rate (decoupled for adamw, adafactor and muon). Norms and biases, that is
    all with fewer than two dimensions, do not decay."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum; used by sgd and muon."""
    nesterov: bool = False
    """Nesterov's momentum; used by sgd, which needs a momentum for it. Muon always has it."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=lambda: [0.9, 0.999], min_length=2, max_length=2
    )
    """Decay rates of the two moments; used by adam and adamw."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator of an update; used by adam and adamw."""
    every: int = Field(default=1, gt=0)
    """Optimizer steps of the job for one of this part: a generator with 5 is trained in every fifth step."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.name == "sgd" and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


def _merged(common: Optimizer, own: dict[str, Any]) -> Optimizer:
    return Optimizer.model_validate(common.model_dump() | own)


class Schedule(Spec):
    name: Literal["constant", "cosine", "step", "one_cycle", "plateau"] = "cosine"
    """How the learning rate goes on after warm-up: stay; fall along half a cosine; be multiplied by 'factor' every
    'every' steps; rise and fall in one cycle over the whole run (warmup_steps counts for the rise); or be multiplied
    by 'factor' whenever 'metric' has not improved for 'patience' evaluations."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises linearly from zero."""
    floor: float = Field(default=0.0, ge=0, lt=1)
    """Share of the peak at which a cosine ends."""
    every: int = Field(default=1000, gt=0)
    """Optimizer steps between the falls of 'step'."""
    factor: float = Field(default=0.1, gt=0, lt=1)
    """What the learning rate is multiplied by at a fall of 'step' or 'plateau'."""
    metric: str = "val/loss"
    """What 'plateau' watches."""
    goal: Literal["min", "max"] = "min"
    """Whether 'metric' is better when lower or higher."""
    patience: int = Field(default=5, gt=0)
    """Evaluations without a new best before 'plateau' falls."""


class EarlyStop(Spec):
    metric: str = "val/loss"
    """The evaluated metric to watch."""
    goal: Literal["min", "max"] = "min"
    """Whether it is better when lower or higher."""
    patience: int | None = Field(default=None, gt=0)
    """Evaluations without a new best after which training ends; never when not given."""
    min_delta: float = Field(default=0.0, ge=0)
    """What counts as better: more than this beyond the best so far."""


class TrainSpec(Spec):
    epochs: float = Field(default=20, gt=0)
    """Passes over the training part."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; takes the place of epochs when given."""
    global_batch: int = Field(default=64, gt=0)
    """Samples per optimizer step, over all ranks."""
    microbatches: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Forward/backward passes that make one step, over all ranks. 'auto' is one per data-parallel rank, times
    parallel.pipeline. Randomness (dropout, augmentation) is keyed by microbatch, so fix the number to have it
    independent of the world size."""
    last_step: Literal["pad", "drop"] = "pad"
    """The last step has fewer samples when the total is no multiple of global_batch: 'pad' takes them (empty
    places weigh zero), 'drop' leaves them out. Every earlier step is full: batches run on across epochs."""
    optimizer: Optimizer = Field(default_factory=Optimizer)
    """The optimizer."""
    parts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What differs from 'optimizer' for a part of the recipe, such as {discriminator: {lr: 0.0004}}."""
    schedule: Schedule = Field(default_factory=Schedule)
    """The learning-rate schedule."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Scale gradients so that their global L2 norm stays below this."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a step does whose loss, or a gradient, is infinite or undefined: 'stop' ends the run before a weight is
    changed, and the report names the samples; 'skip' changes nothing in that step, and goes on. Not for the overflows
    of 'fp16', which are always skipped."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """'bf16' computes matrix products and convolutions in bfloat16, 'fp16' in float16 (torch's autocast); weights,
    gradients and the optimizer stay in float32. With 'fp16' the loss is scaled up so that small gradients do not
    vanish, and a step whose gradients overflow changes nothing."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the weights with this decay; it is what is evaluated and exported."""
    recompute: bool = False
    """Keep only the inputs of each of the model's units for backward, and compute the rest again (activation
    checkpointing): less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile; the first step takes longer."""
    evaluate_every: int | None = Field(default=None, gt=0)
    """Optimizer steps between evaluations on the validation part; the default is once an epoch."""
    evaluate_batch: int = Field(default=64, gt=0)
    """Samples in one forward pass of an evaluation."""
    early_stop: EarlyStop = Field(default_factory=EarlyStop)
    """When to end before 'steps' or 'epochs'."""
    log_every: int = Field(default=1, gt=0)
    """Optimizer steps between rows in the metrics."""

    @field_validator("parts")
    @classmethod
    def _are_optimizers(cls, parts: dict[str, dict[str, Any]], info: ValidationInfo) -> dict[str, dict[str, Any]]:
        common: Optimizer = info.data.get("optimizer", Optimizer())  # not there when it is wrong itself
        for part, own in parts.items():
            try:
                _merged(common, own)
            except ValidationError as error:
                raise ValueError(f"part '{part}': {word_detail(error.errors()[0])}") from None
        return parts

    def optimizer_of(self, part: str) -> Optimizer:
        """The optimizer of a part: 'optimizer' with what 'parts' says of it."""
        return _merged(self.optimizer, self.parts.get(part, {}))
