"""Batches: the plan's samples, exactly, in every mode of loading; nothing left behind; errors where they belong."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from dltrain.core.contracts import Batch
from dltrain.core.job import DataSpec
from dltrain.data.loader import Loader, eval_batches
from dltrain.data.normalize import Normalizer
from dltrain.data.order import StepPlan
from dltrain.data.sources import ArraySource, DatasetSource, open_source
from dltrain.data.split import Subset
from hypothesis import given, settings
from hypothesis import strategies as st

MODES = {"inline": {"prefetch": 0}, "thread": {"prefetch": 2}, "workers": {"workers": 2}}

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning",
    "ignore:This DataLoader will create 2 worker processes:UserWarning",  # on one core
)


class Numbers:
    """A source whose x is the sample's index; not an array in memory, so a thread reads it."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def fetch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return {"x": torch.from_numpy(indices.copy())}


class Watched(Numbers):
    """Calls ``before`` with the number of the fetch."""

    def __init__(self, n: int, before: Callable[[int], None]) -> None:
        super().__init__(n)
        self.before, self.count = before, 0

    def fetch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        self.before(self.count)
        self.count += 1
        return super().fetch(indices)


class Augmented:
    """A map-style data set that draws from all three global generators."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([i, torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64), i


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dltrain-data"]


def children() -> list[int]:
    """Child processes, but for those that multiprocessing keeps for other tests: fork server and resource tracker."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids if b"from multiprocessing." not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited 60 s for {what}"
        time.sleep(0.005)


@pytest.fixture(autouse=True, scope="module")
def _what_was_there_is_not_collected() -> Iterator[None]:
    """Each test collects garbage, which takes a second where other tests' modules and servers are in memory."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = set(children())
    yield
    gc.collect()
    assert not data_threads()
    assert not multiprocessing.active_children()
    assert not set(children()) - before


def content(steps: Iterator[list[Batch]]) -> list[list[tuple[int, int, float, dict[str, list[float]]]]]:
    return [
        [(b.step, b.index, b.weight, {key: value.tolist() for key, value in b.fields.items()}) for b in batches]
        for batches in steps
    ]


# --- which samples


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_together_read_exactly_the_plans_samples(mode: str, ranks: int) -> None:
    plan = StepPlan(37, 5, 16, 4, epochs=2)
    loaders = [Loader(Numbers(37), plan, rank=r, data_ranks=ranks, **MODES[mode]) for r in range(ranks)]
    for step, of_ranks in enumerate(zip(*loaders, strict=True)):
        batches = [batch for of_rank in of_ranks for batch in of_rank]
        assert [batch.index for batch in batches] == [0, 1, 2, 3]
        assert {batch.step for batch in batches} == {step}
        assert [i for batch in batches if batch.weight for i in batch["x"].tolist()] == plan.samples(step).tolist()
        assert sum(batch.weight for batch in batches) == pytest.approx(1.0)
        assert all(len(batch["x"]) for batch in batches)
    assert step == plan.total_steps - 1


@given(
    n=st.integers(1, 200),
    ranks=st.integers(1, 8),
    per_rank=st.integers(1, 3),
    extra=st.integers(0, 30),
    prefetch=st.integers(0, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_resuming_anywhere_reads_the_rest(
    n: int, ranks: int, per_rank: int, extra: int, prefetch: int, data: st.DataObject
) -> None:
    plan = StepPlan(n, n, ranks * per_rank + extra, ranks * per_rank, epochs=2)
    start = data.draw(st.integers(0, plan.total_steps))
    rank = data.draw(st.integers(0, ranks - 1))
    whole = content(Loader(Numbers(n), plan, rank=rank, data_ranks=ranks, prefetch=0))
    rest = content(Loader(Numbers(n), plan, rank=rank, data_ranks=ranks, prefetch=prefetch, start_step=start))
    assert len(whole) == plan.total_steps
    assert rest == whole[start:]


def test_all_modes_give_the_same_bits() -> None:
    source = open_source(DataSpec())
    train = Subset(source, np.arange(0, 1797, 2))
    plan = StepPlan(len(train), 3, 64, 2, steps=6)
    normalizer = Normalizer.fit(train, range(len(train)))
    inline, thread, workers = (
        content(Loader(train, plan, rank=0, data_ranks=1, normalizer=normalizer, **mode)) for mode in MODES.values()
    )
    assert inline == thread == workers
    samples = source.fetch(np.arange(0, 1797, 2)[plan.samples(0)])
    expected = normalizer.apply(samples)["x"][:32]
    assert inline[0][0][3] == {"x": expected.tolist(), "y": samples["y"][:32].tolist()}


@pytest.mark.parametrize("mode", MODES)
def test_the_transform_comes_last(mode: str) -> None:
    def negate(batch: Batch) -> Batch:
        return Batch({**batch.fields, "x": -batch["x"], "step": torch.tensor(batch.step)}, batch.step, 7, batch.weight)

    source = ArraySource({"x": np.arange(8.0)})
    plan = StepPlan(8, 0, 4, 1, epochs=1)
    scaled = Normalizer(1.0, 2.0)
    loader = Loader(source, plan, rank=0, data_ranks=1, normalizer=scaled, transform=negate, **MODES[mode])
    for step, (batch,) in enumerate(loader):
        assert batch["x"].tolist() == [-(i - 1) / 2 for i in plan.samples(step).tolist()]
        assert batch["step"] == step
        assert batch.index == 7


def test_what_does_not_fit_together_is_refused() -> None:
    plan = StepPlan(10, 0, 4, 2, epochs=1)
    with pytest.raises(ValueError, match="10 samples, the source has 9"):
        Loader(Numbers(9), plan, rank=0, data_ranks=1)
    with pytest.raises(ValueError, match="evenly"):
        Loader(Numbers(10), plan, rank=0, data_ranks=3)
    with pytest.raises(IndexError):
        Loader(Numbers(10), plan, rank=0, data_ranks=1, start_step=4)
    assert list(Loader(Numbers(10), plan, rank=0, data_ranks=1, start_step=3)) == []


# --- random numbers


def drawn(ranks: int, start: int = 0, **mode: int) -> list[list[list[float]]]:
    """By step and microbatch, what the data set gave."""
    plan = StepPlan(50, 9, 20, 4, steps=5)
    by_rank = [
        Loader(DatasetSource(Augmented()), plan, rank=r, data_ranks=ranks, start_step=start, **mode)
        for r in range(ranks)
    ]
    return [[b["x"].tolist() for own in of_ranks for b in own] for of_ranks in zip(*by_rank, strict=True)]


def test_random_augmentation_replays_in_every_mode_at_any_world_size_and_after_a_resume() -> None:
    reference = drawn(1, prefetch=0)
    assert len({value for step in reference for batch in step for row in batch for value in row[1:]}) == 5 * 20 * 3
    for mode in MODES.values():
        assert drawn(2, **mode) == reference
    assert drawn(4) == reference
    assert drawn(1, start=3) == reference[3:]


def test_reading_leaves_the_callers_generators_alone() -> None:
    def states() -> tuple[list[int], list[int], object]:
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    for mode in MODES.values():
        drawn(1, **mode)
    for _ in eval_batches(DatasetSource(Augmented()), range(50), rank=0, data_ranks=1, batch_size=8):
        pass
    assert states() == before


def test_a_source_that_draws_is_not_read_by_a_thread() -> None:
    plan = StepPlan(50, 9, 20, 4, steps=5)
    with Loader(DatasetSource(Augmented()), plan, rank=0, data_ranks=1, prefetch=2) as loader:
        next(loader)
        assert not data_threads()
    with Loader(Numbers(50), plan, rank=0, data_ranks=1, prefetch=2) as loader:
        next(loader)
        assert data_threads()


# --- the thread


def test_small_batches_from_memory_are_read_without_a_thread_and_large_ones_with_one() -> None:
    for width, expected in ((100, 0), (40_000, 1)):
        source = ArraySource({"x": np.zeros((20, width), dtype=np.float32)})
        view = Subset(source, range(20))
        with Loader(view, StepPlan(20, 0, 10, 1, steps=9), rank=0, data_ranks=1, prefetch=2) as loader:
            next(loader)
            assert len(data_threads()) == expected


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_than_prefetch_microbatches_are_read_ahead(depth: int) -> None:
    taken = 0
    ahead: list[int] = []
    source = Watched(100, lambda count: ahead.append(count + 1 - taken))
    plan = StepPlan(100, 0, 4, 2, steps=25)
    for batches in Loader(source, plan, rank=0, data_ranks=1, prefetch=depth):
        until(lambda: source.count >= min(50, taken + depth), "the thread to read ahead")  # noqa: B023
        taken += len(batches)
    # Of the microbatches of a step, the loader takes the first ones before the caller sees any.
    assert depth <= max(ahead) <= depth + 2


@pytest.mark.parametrize("mode", MODES)
def test_an_error_in_the_data_set_comes_out_where_the_batch_is_taken(mode: str) -> None:
    def burn(count: int) -> None:
        if count >= 1:
            raise OSError("disk on fire")

    plan, before = StepPlan(100, 0, 4, 1, steps=25), set(children())
    with Loader(Watched(100, burn), plan, rank=0, data_ranks=1, **MODES[mode]) as loader:
        with pytest.raises(OSError, match="disk on fire") as caught:
            list(loader)
        assert not data_threads()
        assert not set(children()) - before, "the workers end with the error, not when it is collected"
        text = "".join(traceback.format_exception(caught.value))
        assert "in burn" in text
        assert "while reading microbatch 0 of step" in text
        with pytest.raises(StopIteration):
            next(loader)


@pytest.mark.parametrize("mode", MODES)
def test_a_data_set_that_stops_early_does_not_end_the_run_quietly(mode: str) -> None:
    def stop(count: int) -> None:
        if count >= 1:
            raise StopIteration

    plan = StepPlan(100, 0, 4, 1, steps=25)
    loader = Loader(Watched(100, stop), plan, rank=0, data_ranks=1, **MODES[mode])
    with pytest.raises(RuntimeError):
        list(loader)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_ends_the_thread(taken: int) -> None:
    loader = Loader(Numbers(1000), StepPlan(1000, 0, 4, 1, epochs=1), rank=0, data_ranks=1)
    for _ in range(taken):
        next(loader)
    loader.close()
    assert not data_threads()
    loader.close()
    assert list(loader) == []


def test_close_waits_for_the_read_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def block(count: int) -> None:
        if count == 2:
            reading.set()
            assert go_on.wait(60)

    source = Watched(100, block)
    loader = Loader(source, StepPlan(100, 0, 4, 1, steps=25), rank=0, data_ranks=1, prefetch=3)
    next(loader)
    assert reading.wait(60)
    (thread,) = data_threads()
    join = thread.join

    def wait_for_it(timeout: float | None = None) -> None:
        go_on.set()
        join(timeout)

    monkeypatch.setattr(thread, "join", wait_for_it)  # it reads until it is waited for
    loader.close()
    assert go_on.is_set()
    assert not data_threads()
    assert source.count == 3, "nothing is read after close"


def test_a_read_that_does_not_end_is_reported_and_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dltrain.data.loader._GRACE", 0.05)
    monkeypatch.setattr("dltrain.data.loader._PATIENCE", 0.05)
    reading, go_on = threading.Event(), threading.Event()

    def block(count: int) -> None:
        if count == 2:
            reading.set()
            go_on.wait(60)

    loader = Loader(Watched(100, block), StepPlan(100, 0, 4, 1, steps=25), rank=0, data_ranks=1, prefetch=1)
    next(loader)
    next(loader)
    assert reading.wait(60)
    loader.close()
    assert "left behind" in caplog.text
    go_on.set()
    until(lambda: not data_threads(), "the thread to end")


def test_a_long_wait_for_data_is_not_silent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("dltrain.data.loader._PATIENCE", 0.02)
    source = Watched(100, lambda count: count != 1 or until(lambda: "no data for" in caplog.text, "a line in the log"))
    with Loader(source, StepPlan(100, 0, 4, 1, steps=25), rank=0, data_ranks=1, prefetch=1) as loader:
        assert len(list(loader)) == 25


def test_a_loader_that_is_dropped_ends_its_thread() -> None:
    loader = Loader(Numbers(100), StepPlan(100, 0, 4, 1, steps=25), rank=0, data_ranks=1)
    next(loader)
    assert data_threads()
    del loader
    gc.collect()
    until(lambda: not data_threads(), "the thread to end")


# --- worker processes


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_ends_the_workers(taken: int) -> None:
    before = len(children())
    loader = Loader(Numbers(1000), StepPlan(1000, 0, 4, 1, epochs=1), rank=0, data_ranks=1, workers=2)
    for _ in range(taken):
        next(loader)
    assert len(children()) - before == (2 if taken else 0)
    loader.close()
    assert len(children()) == before


def test_workers_read_in_other_processes() -> None:
    class Pids(Numbers):
        def fetch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
            return {"pid": torch.tensor(os.getpid())}

    loader = Loader(Pids(100), StepPlan(100, 0, 10, 1, epochs=1), rank=0, data_ranks=1, workers=2)
    pids = {int(batch["pid"]) for batches in loader for batch in batches}
    assert len(pids) == 2
    assert os.getpid() not in pids
