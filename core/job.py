"""The ``Job``: everything a job file can say, checked. No torch, no Ray.

Every field's description is what ``dltrain config init`` and the JSON schema print, so it is written for users.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .formats import Format, is_url
from .parallel import Parallel
from .schema import word_detail

_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)\s*$")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

_CREDENTIALS = frozenset(
    (
        *("key", "secret", "token", "username", "password", "account_key", "sas_token", "connection_string"),
        *("credential", "aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
    )
)


def parse_duration(value: object) -> float:
    """Seconds from ``"30s"``, ``"10min"``, ``"1.5h"`` or a plain number of seconds.

    Raises:
        ValueError: the text is no duration, or it is negative.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value < 0:
            raise ValueError("a duration cannot be negative")
        return float(value)
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no duration: write a number of seconds, or like '30s', '10min', '1.5h'")
    return float(match[1]) * _SECONDS[match[2]]


Duration = Annotated[float, PlainValidator(parse_duration, json_schema_input_type=float | str), PlainSerializer(float)]


def _refuse_credentials(options: Mapping[str, Any]) -> None:
    """Raise ValueError where storage options, or mappings in them such as s3fs's ``client_kwargs``, hold a secret."""
    found = sorted(options.keys() & _CREDENTIALS)
    if found:
        raise ValueError(f"credentials ({', '.join(found)}) belong in the environment, not in a job")
    for value in options.values():
        if isinstance(value, dict):
            _refuse_credentials(cast("dict[str, Any]", value))


class Spec(BaseModel):
    """Base of the job's parts: immutable, strict about types, refusing unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Split(Spec):
    train: float = Field(default=0.8, gt=0, le=1)
    """Share of the samples to train on."""
    val: float = Field(default=0.1, ge=0, lt=1)
    """Share to evaluate on during training."""
    test: float = Field(default=0.1, ge=0, lt=1)
    """Share to evaluate on once, at the end."""

    @model_validator(mode="after")
    def _sum(self) -> Self:
        if abs(self.train + self.val + self.test - 1.0) > 1e-9:
            raise ValueError(f"train + val + test must be 1, not {self.train + self.val + self.test:g}")
        return self


class DataSpec(Spec):
    source: str = "digits"
    """Where samples come from: a built-in data set ('digits', 'digits_scan', 'iris', 'wine', 'breast_cancer',
    'diabetes', 'stdlib_text'), the path or URL of a file or folder, or 'module:function' that returns a map-style
    dataset."""
    format: Format = "auto"
    """What lies at a path or URL; 'auto' tells it by the file's ending, and a folder's by the files in it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """How the file is read (which columns, which size: see the format), the options of a built-in data set, or keyword
    arguments for 'module:function'."""
    storage: dict[str, Any] = Field(default_factory=dict)
    """Storage options for the fsspec filesystem of a URL, without credentials."""
    split: Split = Field(default_factory=Split)
    """How samples are dealt to training, validation and test: by a keyed hash of the sample."""
    normalize: bool = True
    """Scale floating-point inputs 'x' to zero mean and unit variance, both computed on the training part only: each
    feature of a table (two axes) on its own, everything else by one figure for all."""
    prefetch: int = Field(default=2, ge=0)
    """Microbatches prepared ahead of the step by a background thread; 0 prepares them in the step, as is always done
    with small batches from memory and with data sets that draw random numbers."""
    workers: int = Field(default=0, ge=0)
    """Processes per rank that load samples (torch's DataLoader); 0 loads in the rank itself."""

    @model_validator(mode="after")
    def _no_credentials(self) -> Self:
        _refuse_credentials(self.storage)
        if is_url(self.source):
            _refuse_credentials(self.options)
        return self


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


class CheckpointSpec(Spec):
    to: str | None = None
    """Folder or fsspec URL (s3://bucket/run); the default is 'checkpoints' in the run directory."""
    every: int | str | None = None
    """Optimizer steps between checkpoints, or the time between them, as '10min'; the default is one at the end and one
    when asked to stop."""
    keep: int = Field(default=3, gt=0)
    """How many of the newest checkpoints stay."""
    keep_best: str | None = None
    """An evaluated metric, such as val/loss: a checkpoint is also saved when an evaluation finds a new best, and the
    best one stays beside the newest."""
    keep_best_goal: Literal["min", "max"] = "min"
    """Whether that metric is better when lower or higher."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Storage options for the fsspec filesystem. Credentials are refused here: a job is written into its run."""

    @field_validator("every")
    @classmethod
    def _is_interval(cls, every: int | str | None) -> int | str | None:
        try:
            fits = every is None or (every if isinstance(every, int) else parse_duration(every)) > 0
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"expected optimizer steps above 0 or a time such as '10min', found {every!r}")
        return every

    @model_validator(mode="after")
    def _no_credentials(self) -> Self:
        _refuse_credentials(self.options)
        return self


class WandbSpec(Spec):
    project: str = "dltrain"
    """Weights & Biases project."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """'auto' is online when an API key is set, else offline (kept in the run directory, 'wandb sync' sends it)."""
    entity: str | None = None
    """User or team that owns the run; the default is the key's own."""
    name: str | None = None
    """Display name; the default is the job's name and the run's number."""
    tags: list[str] = Field(default_factory=list)
    """Tags of the run."""


class TrackingSpec(Spec):
    wandb: WandbSpec = Field(default_factory=WandbSpec)
    """Weights & Biases."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run directory (needs the 'tensorboard' extra)."""


class Resources(Spec):
    nodes: int = Field(default=1, gt=0)
    """Nodes to spread over. On an embedded cluster these are logical nodes of this machine."""
    nproc_per_node: Annotated[int, Field(gt=0)] | Literal["auto", "cpu", "gpu"] = "auto"
    """Ranks per node: a number, 'gpu' (one per GPU), 'cpu' (one per core), or 'auto' (per GPU, else one)."""
    cpus_per_rank: int | None = Field(default=None, gt=0)
    """CPU cores reserved per rank on a Ray cluster, and threads per rank; the default shares the node's evenly."""
    network_interface: str | None = None
    """Name of the interface that ranks talk over (such as eth0); the default is the one Ray's nodes use."""
    placement: Literal["auto", "spread", "pack"] = "auto"
    """'spread': each node on a machine of its own. 'pack': logical nodes may share machines. 'auto' spreads over an
    existing cluster and packs on the embedded one."""


class RecoverySpec(Spec):
    max_restarts: int = Field(default=0, ge=0)
    """How often the ranks are started again after a failure (from the newest checkpoint)."""
    start_timeout: Duration = 120.0
    """Longest wait for the cluster, the node agents and the fork servers, each."""
    stop_grace: Duration = 30.0
    """Time that ranks get to end after the first Ctrl-C or SIGTERM before they are killed."""
    stall: Duration | Literal["auto", "never"] = "auto"
    """How long a rank may stay in one place of a step before that counts as a failure. 'auto' is ten times the slowest
    step, and two minutes at least; 'never' lets ranks hang. Scripts are not watched: they do not say where they are."""

    @field_validator("stall", mode="before")
    @classmethod
    def _parse_stall(cls, stall: object) -> object:
        if stall in ("auto", "never"):
            return stall
        try:
            seconds = parse_duration(stall)
        except ValueError as error:
            raise ValueError(f"{error}; or 'auto' or 'never'") from None
        if seconds < 1:
            raise ValueError("ranks are looked at about twice a second: give at least 1 s, or 'never'")
        return seconds


class Job(Spec):
    """One training job: what a YAML file says, resolved and checked."""

    name: str = Field(default="digits", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the job; its runs lie in <runs>/<name>/."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Root of all randomness: initial weights, sample order, dropout."""
    recipe: str = "cnn"
    """The model and how to train it: 'cnn', 'gan', 'mlp', 'rnn', 'transformer', or your own as
    'my_pkg.my_module:MyRecipe'."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the recipe, by name."""
    data: DataSpec = Field(default_factory=DataSpec)
    """The data set, its split and its loading."""
    parallel: Parallel = Field(default_factory=Parallel)
    """How the work is spread over ranks."""
    train: TrainSpec = Field(default_factory=TrainSpec)
    """Length, batch, optimizer, evaluation."""
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    """What is saved, where, how often."""
    tracking: TrackingSpec = Field(default_factory=TrackingSpec)
    """Where metrics go besides metrics.jsonl."""
    resources: Resources = Field(default_factory=Resources)
    """Nodes, ranks, cores, network."""
    recovery: RecoverySpec = Field(default_factory=RecoverySpec)
    """What happens when something dies."""
