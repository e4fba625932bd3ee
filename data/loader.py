"""From a plan to batches: this rank's microbatches, step by step, read in the step, ahead of it, or by processes."""

from __future__ import annotations

import logging
import math
import random
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..core.contracts import Batch, Source
from ..core.keys import derive
from .arrays import ArraySource
from .normalize import Normalizer
from .order import Microbatch, StepPlan
from .split import Indices, Subset, look_up

_log = logging.getLogger(__name__)

Transform = Callable[[Batch], Batch]

_CHEAP_BYTES = 1 << 20  # a smaller batch is read from memory faster than a thread hands it over
_PATIENCE = 60.0  # seconds without data after which the rank's log says so
_GRACE = 10.0  # seconds that a thread gets to end the read it is in


class Loader:
    """The microbatches of one data-parallel rank, one list per optimizer step, from ``start_step`` to the plan's end.

    Random numbers that a data set or ``transform`` draws from the global generators of torch (CPU), numpy and
    ``random`` are keyed by (seed, step, microbatch): they replay after a restart, at any world size and in every mode
    of loading, and the caller's generators are left as they were. A source that draws (its first microbatch tells) is
    not read by a thread, which would share the generators with the training step, but in the step or by ``workers``.

    Iterate to the end or call :meth:`close` (a ``with`` block does); threads and processes end then.

    Args:
        source: the training part; ``len(source)`` is the plan's ``n``.
        plan: which samples each step takes.
        rank: data-parallel rank, of ``data_ranks``.
        normalizer: applied to every batch.
        start_step: the first step to give.
        prefetch: microbatches read ahead by a thread; 0 reads in the step. Small batches from memory are read in the
            step too, because the hand-over would cost more than the reading.
        workers: processes that read; 0 for none. They read at least ``prefetch`` microbatches ahead.
        transform: applied last, to every batch.

    Raises:
        ValueError: the source is not the plan's, or the microbatches cannot be dealt evenly to the ranks.
        IndexError: ``start_step`` lies beyond the plan's end.
    """

    def __init__(
        self,
        source: Source,
        plan: StepPlan,
        *,
        rank: int,
        data_ranks: int,
        normalizer: Normalizer | None = None,
        start_step: int = 0,
        prefetch: int = 2,
        workers: int = 0,
        transform: Transform | None = None,
    ) -> None:
        if len(source) != plan.n:
            raise ValueError(f"the plan is for {plan.n} samples, the source has {len(source)}")
        self._per_step = len(plan.mine(rank, data_ranks))
        reader = _Reader(source, plan.seed, normalizer or Normalizer(), transform)
        pieces = chain.from_iterable(plan.deal(rank=rank, data_ranks=data_ranks, start_step=start_step))
        if workers:
            self._batches = _from_workers(reader, pieces, workers=workers, prefetch=prefetch)
        else:
            self._batches = _from_here(reader, pieces, prefetch=prefetch)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Batch]:
        batches = list(islice(self._batches, self._per_step))
        if not batches:
            raise StopIteration
        return batches

    def close(self) -> None:
        """End threads and processes; afterwards there are no more batches. Twice is once."""
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def eval_batches(
    source: Source,
    indices: Indices,
    *,
    rank: int,
    data_ranks: int,
    batch_size: int,
    normalizer: Normalizer | None = None,
) -> Iterator[tuple[Batch, int]]:
    """The samples at ``indices``, each exactly once over all ranks: (batch, number of its samples that count).

    The cut into batches does not depend on the number of ranks, which are dealt whole batches in contiguous runs. All
    ranks get the same number of batches, since forward passes may be collective: who has one less gets the first sample
    once more, with weight 0 and a count of 0. Weights are shares of all samples.
    """
    normalizer = normalizer or Normalizer()
    count = math.ceil(len(indices) / batch_size)
    mine = range(count * rank // data_ranks, count * (rank + 1) // data_ranks)
    for index in (*mine, *(count for _ in range(math.ceil(count / data_ranks) - len(mine)))):
        counted = index < count
        start, stop = (index * batch_size, min((index + 1) * batch_size, len(indices))) if counted else (0, 1)
        with _keyed_randomness(derive(0, "evaluate", index)):  # a data set that draws gives the same every time
            fields = normalizer.apply(source.fetch(look_up(indices, np.arange(start, stop, dtype=np.int64))))
        samples = stop - start if counted else 0
        yield Batch(fields, step=0, index=index, weight=samples / len(indices)), samples


@dataclass(frozen=True)
class _Reader:
    """Makes a microbatch's batch. Also the data set of the worker processes."""

    source: Source
    seed: int
    normalizer: Normalizer
    transform: Transform | None

    def read(self, piece: Microbatch) -> Batch:
        try:
            fields = self.normalizer.apply(self.source.fetch(piece.indices))
            batch = Batch(fields, piece.step, piece.index, piece.weight)
            return self.transform(batch) if self.transform else batch
        except StopIteration as error:
            raise RuntimeError("the data set raised StopIteration") from error  # else it would end the run quietly
        except Exception as error:
            error.add_note(f"while reading microbatch {piece.index} of step {piece.step}: samples {piece.indices}")
            raise

    def read_keyed(self, piece: Microbatch) -> tuple[Batch, bool]:
        """The batch, read under keyed random numbers, and whether any were drawn."""
        with _keyed_randomness(derive(self.seed, "data", piece.step, piece.index)) as drawn:
            batch = self.read(piece)
            return batch, drawn()

    def is_cheap(self, batch: Batch) -> bool:
        """Whether reading such a batch costs less than handing it over from a thread."""
        source = self.source.source if isinstance(self.source, Subset) else self.source
        size = sum(field.nbytes for field in batch.fields.values())
        return isinstance(source, ArraySource) and self.transform is None and size < _CHEAP_BYTES

    def __getitems__(self, piece: Microbatch) -> Batch:
        return self.read_keyed(piece)[0]


@contextmanager
def _keyed_randomness(key: int) -> Iterator[Callable[[], bool]]:
    """Seed the global CPU generators with ``key``, and put them back afterwards; gives a test whether any was used."""
    before = _generator_states()
    try:
        # Three keys: numpy and random seed the same algorithm in the same way, and would draw the same numbers.
        torch.default_generator.manual_seed(derive(key, "torch"))
        np.random.seed(derive(key, "numpy") & 0xFFFFFFFF)
        random.seed(derive(key, "random"))
        seeded = _generator_states()
        yield lambda: not _same(seeded, _generator_states())
    finally:
        torch.default_generator.set_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def _generator_states() -> tuple[torch.Tensor, Any, Any]:
    return torch.default_generator.get_state(), np.random.get_state(legacy=False), random.getstate()


def _same(a: tuple[torch.Tensor, Any, Any], b: tuple[torch.Tensor, Any, Any]) -> bool:
    numpy_same = a[1]["state"]["pos"] == b[1]["state"]["pos"] and np.array_equal(
        a[1]["state"]["key"], b[1]["state"]["key"]
    )
    return numpy_same and a[2] == b[2] and torch.equal(a[0], b[0])


def _from_here(reader: _Reader, pieces: Iterator[Microbatch], *, prefetch: int) -> Generator[Batch]:
    first = next(pieces, None)
    if first is None:
        return
    batch, random_source = reader.read_keyed(first)
    if random_source:
        yield batch
        for piece in pieces:
            yield reader.read_keyed(piece)[0]
    elif prefetch and not reader.is_cheap(batch):
        with _Prefetcher((reader.read(piece) for piece in pieces), depth=prefetch) as ahead:
            yield batch
            yield from ahead
    else:
        yield batch
        for piece in pieces:
            yield reader.read(piece)


def _from_workers(reader: _Reader, pieces: Iterator[Microbatch], *, workers: int, prefetch: int) -> Generator[Batch]:
    # The microbatches take the place of lists of indices, so the batches come back in their order, complete.
    loader = DataLoader(
        cast(Any, reader),
        batch_sampler=cast(Any, pieces),
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=max(1, math.ceil(prefetch / workers)),
        generator=torch.Generator(),  # otherwise it draws from the global one
    )
    batches = iter(loader)
    try:
        yield from batches
    except Exception as error:
        # The frames of a worker's error hold the iterator in a cycle. Left to the garbage collector, its queues would
        # close before it could use them to end the workers, and it would wait five seconds for each.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        del batches  # the last reference: ends the workers


def _as_it_is(batch: Any) -> Any:
    return batch


class _Prefetcher:
    """A thread that keeps up to ``depth`` batches ready; its errors come out where the batches are taken."""

    def __init__(self, batches: Iterator[Batch], *, depth: int) -> None:
        self._slots: SimpleQueue[bool] = SimpleQueue()  # one True per batch that may be read, False to stop
        self._ready: SimpleQueue[Batch | BaseException | None] = SimpleQueue()
        for _ in range(depth):
            self._slots.put(True)
        fill = partial(_fill, batches, self._slots, self._ready)  # no reference to self, which may be collected
        self._thread = threading.Thread(target=fill, name="dltrain-data", daemon=True)

    def __enter__(self) -> Iterator[Batch]:
        self._thread.start()
        return iter(self._take, None)

    def _take(self) -> Batch | None:
        while True:
            try:
                item = self._ready.get(timeout=_PATIENCE)
                break
            except Empty:
                _log.warning("no data for %.0f s: the thread '%s' is still reading", _PATIENCE, self._thread.name)
        if isinstance(item, BaseException):
            raise item
        self._slots.put(True)
        return item

    def __exit__(self, *_: object) -> None:
        with suppress(Empty):
            while True:
                self._slots.get_nowait()
        self._slots.put(False)
        self._thread.join(_GRACE)
        if self._thread.is_alive():
            _log.warning("the thread '%s' is still reading after %.0f s; left behind", self._thread.name, _GRACE)


def _fill(batches: Iterator[Batch], slots: SimpleQueue[bool], ready: SimpleQueue[Batch | BaseException | None]) -> None:
    try:
        while slots.get():
            batch = next(batches, None)
            ready.put(batch)
            if batch is None:
                return
    except BaseException as error:  # whatever it is, the consumer must not wait for ever
        ready.put(error)
