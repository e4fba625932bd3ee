"""What the floors above agree on: recipes, engines, batches, state. Types only; torch is never imported here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from .runs import boxes_of_run

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


#: How one submodule is cut over a tensor group. 'column': a Linear by its outputs, which stay cut along the last axis.
#: 'row': a Linear by its inputs, which come cut along the last axis; its outputs are whole. A 'column' and the 'row' it
#: feeds need one all-reduce between them. 'whole_column': by its outputs, which are gathered. 'embedding': an Embedding
#: by its vocabulary. 'dropout': a Dropout of values that are cut along the last axis: the mask of the whole, sliced.
TensorRule = Literal["column", "row", "whole_column", "embedding", "dropout"]

#: How one submodule works on slices of the sequence. 'norm': on its slice, and the results are gathered. 'dropout': a
#: Dropout that draws the mask of the whole, sliced.
SequenceRule = Literal["norm", "dropout"]


@dataclass(frozen=True)
class Layout:
    """How a part may be cut, as data beside the model: names of modules, no code.

    Attributes:
        units: names of the submodules that are sharded and gathered as one (FSDP units, checkpointing units).
        tensor: how tensor parallelism cuts submodules, by name; ``*`` stands for one component of a name.
        sequence: what works on the ranks' slices of the sequence (axis 1) where the job asks for it, by name. The
            outputs of every 'row' and 'embedding' are then cut along it, until a norm gathers them.
        tensor_sizes: numbers that the ranks of a tensor group share evenly, such as ``{"attention heads": 8}``, beside
            the sizes of the matrices themselves; the names are for messages.
        pipeline: the submodules that the part's ``forward`` runs one after another, by name: the first is given what
            the part is called with, each other one the tensor that the one before returned. Together they hold all
            weights and buffers. A pipeline's stages are consecutive runs of them. One without weights may be named
            several times.
        double_backward: whether the loss differentiates through gradients, as Wasserstein-GP's penalty does. Such a
            part cannot be sharded, since its weights are freed after the first backward, and has no static graph.
    """

    units: tuple[str, ...] = ()
    tensor: Mapping[str, TensorRule] = field(default_factory=dict[str, "TensorRule"])
    sequence: Mapping[str, SequenceRule] = field(default_factory=dict[str, "SequenceRule"])
    tensor_sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    pipeline: tuple[str, ...] = ()
    double_backward: bool = False


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
        """The mean loss of ``part`` over the samples of ``batch``: a scalar tensor with a gradient.

        The other parts are there to be used: their weights are frozen meanwhile. A part may be called once only, and
        whole: strategies gather weights and reduce gradients when it is called, not its submodules.
        """
        ...

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        """One value per sample, shape ``[samples]``, for each metric; the evaluation averages them exactly.

        None by default: then there is nothing to evaluate.
        """
        return {}


@runtime_checkable
class DrawsSamples(Protocol):
    """A recipe that shows what it has learnt as pictures."""

    def samples(self, parts: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
        """Images by name, to be shown as a grid: ``[n, 1 or 3 channels, height, width]`` floats of any range."""
        ...


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

    def boxes(self) -> Iterator[Shard]:
        """The piece as boxes of the tensor: itself."""
        yield self


@dataclass(frozen=True)
class Run:
    """This rank's piece of a tensor where it is a run of consecutive elements, row-major: a cut of a flat buffer.

    Attributes:
        shape: shape of the whole tensor.
        start: index of the first element in the flattened tensor.
        data: the elements, of shape ``[n]``; none where this rank holds nothing of the tensor.
    """

    shape: tuple[int, ...]
    start: int
    data: Tensor

    def boxes(self) -> Iterator[Shard]:
        """The run as boxes of the tensor, whose data are views of its own; they tile it."""
        done = 0
        for offset, extents in boxes_of_run(self.shape, self.start, self.start + self.data.numel()):
            size = prod(extents)
            yield Shard(self.shape, offset, self.data[done : done + size].view(extents))
            done += size


#: State of an engine by fully qualified name: ``model.<part>.<fqn>`` for weights and buffers,
#: ``optimizer.<part>.<fqn>.<slot>`` for the optimizer's, ``ema.<part>.<fqn>`` for averaged weights, ``scaling.<part>.``
#: for the loss scale's figures. The same names under every strategy.
ShardedState = Mapping[str, Shard | Run]

#: Fills each shard's tensor, in place, with the same slice of a saved tensor of the same name.
Fill = Callable[[ShardedState], None]


@dataclass(frozen=True)
class Scaling:
    """What loss scaling did in one part's step; the same on every rank.

    Attributes:
        factor: what the loss was multiplied by.
        skipped: steps of the part that were skipped so far, over the whole run.
        overflowed: whether this one was.
    """

    factor: float
    skipped: int
    overflowed: bool


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave on this rank.

    Attributes:
        loss: by part, this rank's share of the step's mean loss (float scalar tensor); the ranks' shares add up. Only
            the parts that this step trained.
        grad_norm: by part, the global L2 norm before clipping; only where clipping is on and the step was not skipped.
        scaling: by part; only where losses are scaled.
        nonfinite: by part whose loss or gradients were not finite, so that the step did not change it, on any rank:
            those of this rank's microbatches whose loss was not finite, with it. Not where losses are scaled.
    """

    loss: Mapping[str, Tensor]
    grad_norm: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    scaling: Mapping[str, Scaling] = field(default_factory=dict[str, "Scaling"])
    nonfinite: Mapping[str, Mapping[int, float]] = field(default_factory=dict[str, "Mapping[int, float]"])

    def unchanged(self) -> list[str]:
        """The parts that the step was to train, and did not change."""
        return [*(name for name, found in self.scaling.items() if found.overflowed), *self.nonfinite]


class Engine(ABC):
    """What a strategy makes of a recipe. One level: implementations are final.

    Attributes:
        parts: names of the recipe's parts.
        parameters: number of the weights of all parts, whichever ranks hold them.
    """

    parts: tuple[str, ...]
    parameters: int

    @abstractmethod
    def step(self, microbatches: Sequence[Batch], rate: float) -> StepResult:
        """Forward, backward, gradient reduction and one optimizer update, part after part.

        ``rate`` is the schedule's factor: each optimizer takes its own peak learning rate times it.
        """

    @abstractmethod
    def share_buffers(self) -> None:
        """Give every rank the same buffers (running statistics): rank 0's, or its stage's first rank's. Collective.

        Between steps each rank has its own. This comes before they are saved.
        """

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """Have the weights to evaluate with in place, and rank 0's buffers; training's come back after. Collective."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """The recipe's metrics of a batch, one value per sample each; within :meth:`evaluating`."""

    @abstractmethod
    def samples(self) -> Mapping[str, Tensor]:
        """What the recipe draws, if it draws; within :meth:`evaluating`."""

    @abstractmethod
    def state(self) -> ShardedState:
        """This rank's shards of weights, buffers and optimizer state. The tensors are live: copy to keep.

        Collective.
        """

    @abstractmethod
    def load(self, fill: Fill) -> None:
        """Take over saved state: ``fill`` is given this rank's shards, by the names of :meth:`state`, in one call.

        The optimizer's are among them, also before the first step. What ``fill`` raises comes through; then the
        engine's state is undefined until another ``load`` succeeds.
        """
