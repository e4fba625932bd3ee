"""The ``Job``: everything a job file can say, checked. No torch, no Ray.

Every field's description is what ``dltrain config init`` and the JSON schema print, so it is written for users.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from .formats import Format, is_url
from .parallel import Parallel
from .recovery import RecoverySpec
from .spec import Spec, parse_duration
from .train import TrainSpec

_CREDENTIALS = frozenset(
    (
        *("key", "secret", "token", "username", "password", "account_key", "sas_token", "connection_string"),
        *("credential", "aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
    )
)


def _refuse_credentials(options: Mapping[str, Any]) -> None:
    """Raise ValueError where storage options, or mappings in them such as s3fs's ``client_kwargs``, hold a secret."""
    found = sorted(options.keys() & _CREDENTIALS)
    if found:
        raise ValueError(f"credentials ({', '.join(found)}) belong in the environment, not in a job")
    for value in options.values():
        if isinstance(value, dict):
            _refuse_credentials(cast("dict[str, Any]", value))


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
    numerics: Literal["fast", "reproducible"] = "fast"
    """'fast': the same bits on the same number of ranks, with as many threads. 'reproducible': the same bits on every
    number of ranks that divides train.microbatches, which must be a power of two: gradients, running averages and
    losses are added up over the microbatches along one binary tree. For ddp; with one thread for each rank, and
    deterministic operations only."""
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
