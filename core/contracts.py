"""What the floors above agree on: recipes, engines, batches, state. Types only; torch is never imported here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One microbatch.

    Attributes:
        fields: one tensor per key of the data source, each with the samples along axis 0.
        step: the optimizer step it belongs to, counted from 0.
        index: which of the step's microbatches it is, counted over all ranks; randomness is keyed by it.
        weight: its share of the step's samples, in [0, 1]; over all microbatches of a step the weights sum to 1. A
            microbatch that the last step of a run leaves empty repeats real samples with weight 0.
    """

    fields: Mapping[str, Tensor]
    step: int
    index: int
    weight: float

    def __getitem__(self, key: str) -> Tensor:
        return self.fields[key]


@dataclass(frozen=True)
class Layout:
    """How a part may be cut, as data beside the model: names of modules, no code.

    Attributes:
        units: names of the submodules that are sharded and gathered as one (FSDP units, checkpointing units).
    """

    units: tuple[str, ...] = ()


@runtime_checkable
class Recipe(Protocol):
    """A model and how to train it: a class with these methods, constructed as ``MyRecipe(**job.model)``.

    A class that derives from this one may leave out ``layout`` and ``metrics``.
    """

    def parts(self) -> dict[str, nn.Module]:
        """The modules to train, by name, freshly initialised (the caller has seeded torch)."""
        ...

    def layout(self, part: str) -> Layout:
        """How ``part`` may be cut; not at all by default."""
        return Layout()

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        """The mean loss of ``part`` over the samples of ``batch``: a scalar tensor with a gradient."""
        ...

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        """One value per sample, shape ``[samples]``, for each metric; the evaluation averages them exactly.

        None by default: then there is nothing to evaluate.
        """
        return {}


class Source(Protocol):
    """Samples that can be fetched by index, several at a time."""

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """The samples at ``indices`` (int64, shape ``[n]``): one tensor per key, shape ``[n, ...]``, on the CPU."""
        ...


@runtime_checkable
class KeyedSource(Source, Protocol):
    """A source whose samples are split by what they are: one that is added anywhere moves none of the others."""

    def sample_keys(self, indices: np.ndarray) -> np.ndarray:
        """A key of each sample at ``indices`` (int64 ``[n]``): uint64 ``[n]``, the same wherever the sample stands."""
        ...


@runtime_checkable
class DealtSource(Source, Protocol):
    """A source that deals its samples itself: windows of text are cut after the text has been split."""

    def parts(self) -> Mapping[str, range]:
        """The indices of the 'train', 'val' and 'test' parts."""
        ...


@dataclass(frozen=True)
class Shard:
    """This rank's piece of a tensor, and where it lies in the whole.

    Attributes:
        shape: shape of the whole tensor.
        offset: index of the piece's first element along each axis.
        data: the piece.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor


#: State of an engine by fully qualified name: ``model.<part>.<fqn>`` for weights and buffers,
#: ``optimizer.<part>.<fqn>.<slot>`` for the optimizer's. The same names under every strategy.
ShardedState = Mapping[str, Shard]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave on this rank.

    Attributes:
        loss: by part, this rank's share of the step's mean loss (float32 scalar tensor); the ranks' shares add up.
        grad_norm: by part, the global L2 norm before clipping; only where clipping is on.
    """

    loss: Mapping[str, Tensor]
    grad_norm: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])


class Engine(ABC):
    """What a strategy makes of a recipe. One level: implementations are final."""

    @abstractmethod
    def step(self, microbatches: Sequence[Batch], lr: float) -> StepResult:
        """Forward, backward, gradient reduction and one optimizer update with learning rate ``lr``."""

    @abstractmethod
    def share_buffers(self) -> None:
        """Give every rank the same buffers (running statistics): rank 0's. Collective.

        Between steps each rank has its own. This comes before they are evaluated with, or saved.
        """

    @abstractmethod
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """The recipe's metrics of a batch without gradients: one value per sample each."""

    @abstractmethod
    def state(self) -> ShardedState:
        """This rank's shards of weights, buffers and optimizer state. The tensors are live: copy to keep."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over state by the names of :meth:`state`; every tensor is this rank's piece.

        Raises:
            KeyError: a tensor is missing.
        """
