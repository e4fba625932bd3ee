"""The order of the samples: which ones a step takes, as arithmetic on one integer. numpy only.

A keyed permutation gives the order of an epoch without storing it, so any position of any data set is reached in
constant time and every rank, at every world size, computes the same order on its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..core.errors import JobError, Problem

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 16384  # positions ordered in one go: many enough to hide the cost of numpy calls, in about a millisecond


def hash64(key: ArrayLike, value: ArrayLike) -> NDArray[np.uint64]:
    """A 64-bit hash of ``value`` under ``key``, element by element; non-negative integers, broadcast to >= 1 axis.

    The bits are those of SplitMix64 (Steele, Lea & Flood 2014) with a hashed key as its state; mixer: Stafford's 13th.
    """
    state = _mix(np.atleast_1d(np.asarray(key, dtype=np.uint64)))
    return _mix(state + _GOLDEN * (np.atleast_1d(np.asarray(value, dtype=np.uint64)) + np.uint64(1)))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def permute(positions: NDArray[np.int64], *, n: int, key: int) -> NDArray[np.int64]:
    """Where a keyed bijection of ``range(n)`` sends ``positions`` (int64, any shape, each in ``[0, n)``).

    An alternating Feistel network over ``ceil(log2 n)`` bits; results outside ``[0, n)`` are encrypted again until they
    fall inside ("cycle walking", fewer than two rounds on average): Black & Rogaway, "Ciphers with Arbitrary Finite
    Domains", CT-RSA 2002. Not meant to keep secrets. Constant time and memory per element.

    Raises:
        ValueError: ``n`` is not positive, or a position lies outside.
    """
    flat = np.ravel(positions)
    if n < 1 or (flat.size and (flat.min() < 0 or flat.max() >= n)):
        raise ValueError(f"positions must lie in range({n})")
    row = np.zeros(1, dtype=np.int64)
    return _permute(flat, n, _round_keys(np.asarray([key], dtype=np.uint64), n), row).reshape(np.shape(positions))


def _round_keys(keys: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """One key per Feistel round (axis 0) and permutation (axis 1).

    The number of rounds is measured, not proven. On 9 bits and more, pairs of places look uniform from 6 rounds on; 12
    leave a margin. Below, 40 make even whole orders equally likely, as far as all n! can be counted (n = 8).
    """
    rounds = 12 if (n - 1).bit_length() > 8 else 40
    return hash64(keys[None, :], np.arange(rounds)[:, None])


def _permute(
    positions: NDArray[np.int64], n: int, keys: NDArray[np.uint64], row: NDArray[np.int64]
) -> NDArray[np.int64]:
    """``row``: the column of ``keys`` to use for each position, or a single one for all."""
    values = _feistel(positions.astype(np.uint64), n, keys, row)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        values[outside] = _feistel(values[outside], n, keys, row if len(row) == 1 else row[outside])
        outside = outside[values[outside] >= n]
    return values.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], n: int, keys: NDArray[np.uint64], row: NDArray[np.int64]
) -> NDArray[np.uint64]:
    bits = (n - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = values >> low_bits, values & low_mask
    for i in range(0, len(keys), 2):
        low = low ^ (_mix(high ^ keys[i, row]) & low_mask)
        high = high ^ (_mix(low ^ keys[i + 1, row]) & high_mask)
    return (high << low_bits) | low


@dataclass(frozen=True)
class Order:
    """The endless stream of samples: stream position p is place ``p % n`` of epoch ``p // n``.

    Attributes:
        n: samples in the data set.
        seed: root of the order; every epoch has a key of its own, derived from it.
    """

    n: int
    seed: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("an order needs at least one sample")

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at stream positions ``start`` to ``stop`` (exclusive), across epochs; int64 in ``[0, n)``."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at ``positions`` of the stream (int64, one axis, each >= 0); memory in O(positions)."""
        if not positions.size:
            return np.zeros(0, dtype=np.int64)
        epochs, places = np.divmod(positions, self.n)
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            distinct, row = np.asarray([first]), np.zeros(1, dtype=np.int64)
        else:
            distinct, row = np.unique(epochs, return_inverse=True)
        return _permute(places, self.n, _round_keys(hash64(self.seed, distinct), self.n), row)


@dataclass(frozen=True)
class Microbatch:
    """Which samples one forward/backward pass takes.

    Attributes:
        step: optimizer step, from 0.
        index: which of the step's microbatches, over all ranks.
        indices: the samples (int64, one axis).
        weight: share of the step's samples; 0 where ``indices`` only repeats samples to give a rank work.
    """

    step: int
    index: int
    indices: NDArray[np.int64]
    weight: float


@dataclass(frozen=True)
class StepPlan:
    """Which samples each optimizer step takes, and how they are cut; the position of a run is one integer, the step.

    Attributes:
        n: samples in the training part.
        seed: root of the order.
        global_batch: samples per step; every step but a padded last one is full, batches run on across epochs.
        microbatches: pieces that each step is cut into, whatever the number of ranks.
        epochs: passes over the samples, also fractions.
        steps: optimizer steps; takes the place of ``epochs`` when given.
        last_step: whether samples that do not fill a step make a smaller last one ("pad") or are left out ("drop").

    Raises:
        JobError: the plan has no step, or a microbatch would be empty in every step.
    """

    n: int
    seed: int
    global_batch: int
    microbatches: int
    epochs: float = 1.0
    steps: int | None = None
    last_step: Literal["pad", "drop"] = "pad"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise JobError(Problem("no sample to train on", "data.split.train"))
        if not 1 <= self.microbatches <= self.global_batch:
            raise JobError(
                Problem(
                    f"a global batch of {self.global_batch} cannot be cut into {self.microbatches} microbatches",
                    "train.microbatches",
                    f"between 1 and {self.global_batch}",
                )
            )
        if self.total_steps < 1:
            what = f"{self.epochs:g} epochs of {self.n} samples make no step of {self.global_batch}"
            raise JobError(
                Problem(what, "train.epochs", "train longer, take a smaller global_batch, or last_step: pad")
            )

    @property
    def total_samples(self) -> int:
        """Samples that the whole run takes, repeats over epochs counted."""
        if self.steps is not None:
            return self.steps * self.global_batch
        wanted = round(self.epochs * self.n)
        return wanted if self.last_step == "pad" else wanted - wanted % self.global_batch

    @property
    def total_steps(self) -> int:
        return math.ceil(self.total_samples / self.global_batch)

    @property
    def order(self) -> Order:
        return Order(self.n, self.seed)

    def samples_before(self, step: int) -> int:
        """Samples taken by all steps before ``step``."""
        return min(step * self.global_batch, self.total_samples)

    def samples(self, step: int) -> NDArray[np.int64]:
        """The samples of ``step`` in order: ``global_batch`` of them, fewer in a padded last step.

        Raises:
            IndexError: the plan has no such step.
        """
        self._check(step)
        return self.order.indices(self.samples_before(step), self.samples_before(step + 1))

    def microbatch(self, step: int, index: int) -> tuple[NDArray[np.int64], float]:
        """The samples of one microbatch and its share of the step's samples.

        A step is cut into contiguous pieces whose sizes differ by at most one, the larger ones first. A piece that a
        short last step leaves empty repeats the samples of piece 0 with weight 0, so that every rank has work.

        Raises:
            IndexError: the plan has no such step or microbatch.
        """
        self._check(step)
        if not 0 <= index < self.microbatches:
            raise IndexError(f"microbatch {index} of {self.microbatches}")
        start, stop, weight = self._span(step, index)
        return self.order.indices(start, stop), weight

    def owner(self, index: int, data_ranks: int) -> int:
        """The data-parallel rank that computes microbatch ``index``: they are dealt in contiguous, equal runs."""
        return index // self._share(data_ranks)

    def mine(self, rank: int, data_ranks: int) -> range:
        """The microbatches of every step that data-parallel ``rank`` of ``data_ranks`` computes.

        Raises:
            ValueError: the microbatches cannot be dealt evenly.
        """
        share = self._share(data_ranks)
        return range(rank * share, (rank + 1) * share)

    def deal(self, *, rank: int, data_ranks: int, start_step: int = 0) -> Iterator[list[Microbatch]]:
        """The microbatches of ``rank``, a list per step, to the end; ordering many steps at once makes it cheap.

        Raises:
            ValueError: the microbatches cannot be dealt evenly.
            IndexError: ``start_step`` is not in ``[0, total_steps]``.
        """
        mine = self.mine(rank, data_ranks)
        if start_step != self.total_steps:
            self._check(start_step)
        ahead = max(1, _BLOCK * data_ranks // self.global_batch)
        starts = range(start_step, self.total_steps, ahead)
        return (step for first in starts for step in self._block(first, min(first + ahead, self.total_steps), mine))

    def _block(self, first: int, stop: int, mine: range) -> Iterator[list[Microbatch]]:
        places = [(step, index) for step in range(first, stop) for index in mine]
        spans = [self._span(step, index) for step, index in places]
        ordered = self.order.at(np.concatenate([np.arange(start, stop) for start, stop, _ in spans]))
        pieces = np.split(ordered, np.cumsum([stop - start for start, stop, _ in spans[:-1]]))
        dealt = [
            Microbatch(step, index, piece, weight)
            for (step, index), piece, (_, _, weight) in zip(places, pieces, spans, strict=True)
        ]
        return (dealt[i : i + len(mine)] for i in range(0, len(dealt), len(mine)))

    def _check(self, step: int) -> None:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")

    def _share(self, data_ranks: int) -> int:
        if data_ranks < 1 or self.microbatches % data_ranks:
            raise ValueError(f"{self.microbatches} microbatches cannot be dealt evenly to {data_ranks} ranks")
        return self.microbatches // data_ranks

    def _span(self, step: int, index: int) -> tuple[int, int, float]:
        """Stream positions (start, stop) and weight of a microbatch."""
        before = self.samples_before(step)
        size = self.samples_before(step + 1) - before
        small, larger = divmod(size, self.microbatches)
        start, length = index * small + min(index, larger), small + (index < larger)
        if not length:
            return before, before + 1, 0.0  # piece 0 holds one sample when any piece is empty
        return before + start, before + start + length, length / size
