"""The order of the samples: a bijection, uniform, in constant time, the same for every number of ranks."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from dltrain.core.errors import JobError
from dltrain.data.order import Order, StepPlan, hash64, permute
from hypothesis import assume, given, settings
from hypothesis import strategies as st

KEYS = st.integers(0, 2**64 - 1)
SEEDS = st.integers(0, 2**63 - 1)


def z_of_chi_square(counts: np.ndarray, cells: int) -> float:
    """How many standard deviations Pearson's statistic lies above its mean under the uniform distribution."""
    expected = counts.sum() / cells
    statistic = ((counts - expected) ** 2 / expected).sum() + (cells - counts.size) * expected
    return float((statistic - (cells - 1)) / math.sqrt(2 * (cells - 1)))


# --- permute


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1])
def test_every_small_domain_is_permuted(key: int) -> None:
    for n in range(1, 300):
        assert sorted(permute(np.arange(n), n=n, key=key).tolist()) == list(range(n)), n


@given(n=st.integers(300, 5000), key=KEYS)
@settings(max_examples=40, deadline=None)
def test_larger_domains_are_permuted(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n=n, key=key)), np.arange(n))


@pytest.mark.parametrize("n", [10**6, 2**20, 2**20 + 1])
def test_a_full_sweep_of_a_million_is_a_permutation(n: int) -> None:
    image = permute(np.arange(n), n=n, key=7)
    assert image.min() == 0
    assert image.max() == n - 1
    assert np.bincount(image, minlength=n).max() == 1


@given(n=st.sampled_from([10**9, 2**30, 2**30 + 1, 10**12, 2**62]), key=KEYS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_samples_of_a_huge_domain_do_not_collide(n: int, key: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n - 20_000))
    stride = data.draw(st.integers(1, n // 20_000))
    places = (start % stride + np.arange(20_000) * stride) if stride > 1 else start + np.arange(20_000)
    image = permute(places, n=n, key=key)
    assert image.dtype == np.int64
    assert image.min() >= 0
    assert image.max() < n
    assert np.unique(image).size == places.size


@given(n=st.integers(1, 10**12), key=KEYS, picks=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=50))
@settings(deadline=None)
def test_an_element_does_not_depend_on_its_neighbours(n: int, key: int, picks: list[float]) -> None:
    places = np.array([min(int(p * n), n - 1) for p in picks])
    together = permute(places, n=n, key=key)
    assert together.tolist() == [int(permute(np.array([p]), n=n, key=key)[0]) for p in places]


def test_shapes_are_kept_and_positions_outside_are_refused() -> None:
    assert permute(np.zeros((0,), dtype=np.int64), n=5, key=1).shape == (0,)
    assert permute(np.arange(6).reshape(2, 3), n=6, key=1).shape == (2, 3)
    for wrong in ([5], [-1]):
        with pytest.raises(ValueError, match="range"):
            permute(np.array(wrong), n=5, key=1)
    with pytest.raises(ValueError, match="range"):
        permute(np.array([0]), n=0, key=1)


@pytest.mark.parametrize(
    ("n", "epochs"), [(2, 20_000), (3, 60_000), (4, 60_000), (5, 100_000), (6, 150_000), (7, 500_000)]
)
def test_all_orders_of_a_small_data_set_are_equally_likely_over_epochs(n: int, epochs: int) -> None:
    orders = Order(n, seed=3).indices(0, n * epochs).reshape(epochs, n)
    code = orders @ (n ** np.arange(n))
    assert z_of_chi_square(np.unique(code, return_counts=True)[1], math.factorial(n)) < 4.5


@pytest.mark.parametrize("n", [13, 16, 100, 255, 300, 512, 1437, 2048])
def test_places_of_two_samples_are_jointly_uniform(n: int) -> None:
    epochs = 100_000
    order, starts = Order(n, seed=11), np.arange(epochs) * n
    first = order.at(starts)
    assert z_of_chi_square(np.bincount(first, minlength=n), n) < 4.5
    for place in (1, n // 2, n - 1):
        other = order.at(starts + place)
        differences = np.bincount((first - other) % n, minlength=n)
        assert not differences[0]
        assert z_of_chi_square(differences[1:], n - 1) < 4.5
        low, high = first < n // 2, other < n // 2
        expected = epochs * (n // 2) * (n - n // 2) / (n * (n - 1))
        assert abs((low & ~high).sum() - expected) < 4.5 * math.sqrt(expected)


@pytest.mark.parametrize("n", [8, 64, 1437])
def test_neighbouring_epochs_and_neighbouring_keys_are_uncorrelated(n: int) -> None:
    epochs = 400_000 // n
    orders = Order(n, seed=5).indices(0, n * epochs).reshape(epochs, n)
    by_key = np.stack([permute(np.arange(n), n=n, key=key) for key in range(400)])
    by_seed = np.stack([Order(n, seed=s).indices(0, n) for s in range(400)])
    for table in (orders, by_key, by_seed):
        centred = table - (n - 1) / 2
        pairs = (centred[1:] * centred[:-1]).sum(1) / (
            centred[0] ** 2
        ).sum()  # one correlation per pair; std 1/sqrt(n-1)
        assert abs(pairs.mean()) * math.sqrt(pairs.size * (n - 1)) < 4.5
        assert abs(pairs.std() * math.sqrt(n - 1) - 1) < 5 / math.sqrt(2 * pairs.size) + 0.05


def test_an_order_looks_random_from_place_to_place() -> None:
    n = 10**6
    image = permute(np.arange(n), n=n, key=99).astype(float) / n
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(image[:-lag], image[lag:])[0, 1]) < 4.5 / math.sqrt(n)
    steps = np.bincount(((image[1:] - image[:-1]) % 1.0 * 1000).astype(int), minlength=1000)
    assert z_of_chi_square(steps, 1000) < 4.5
    runs = int((np.diff(np.sign(np.diff(image))) != 0).sum())  # turning points: mean 2(n-2)/3, variance (16n-29)/90
    assert abs(runs - 2 * (n - 2) / 3) < 4.5 * math.sqrt((16 * n - 29) / 90)


def test_hash64_spreads_every_bit() -> None:
    values = np.arange(4096)
    plain = hash64(1, values)
    assert np.unique(plain).size == values.size
    for bit in range(0, 40, 3):
        changed = plain ^ hash64(1, values ^ (1 << bit))
        share = np.unpackbits(changed.view(np.uint8)).mean()
        assert abs(share - 0.5) < 0.01, bit
    other_key = np.unpackbits((plain ^ hash64(2, values)).view(np.uint8)).mean()
    assert abs(other_key - 0.5) < 0.01


def test_the_order_never_changes_between_releases() -> None:
    """A resumed run must find the order it started with: these numbers are part of the checkpoint format."""
    assert Order(10, seed=0).indices(0, 20).tolist() == [6, 5, 7, 1, 4, 9, 0, 8, 2, 3, 4, 9, 0, 2, 6, 8, 3, 7, 5, 1]
    assert Order(10**9, seed=1234).indices(10**9 - 3, 10**9 + 3).tolist() == [
        751011078,
        54850199,
        752226781,
        484378702,
        177118997,
        428349205,
    ]


# --- Order


@given(n=st.integers(1, 60), seed=SEEDS, start=st.integers(0, 500), length=st.integers(0, 300))
@settings(deadline=None)
def test_the_stream_crosses_epochs_without_a_seam(n: int, seed: int, start: int, length: int) -> None:
    order = Order(n, seed)
    stream = order.indices(0, start + length)
    assert np.array_equal(order.indices(start, start + length), stream[start:])
    for epoch in stream[: stream.size // n * n].reshape(-1, n):
        assert sorted(epoch.tolist()) == list(range(n))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    n = 1000
    seen = {tuple(Order(n, seed).indices(e * n, (e + 1) * n)) for seed in range(5) for e in range(5)}
    assert len(seen) == 25


def test_any_position_of_a_billion_is_reached_without_storing_the_order() -> None:
    n = 10**9
    tracemalloc.start()
    try:
        plan = StepPlan(n, 42, 1024, 8, epochs=3)
        for step in (0, 1, plan.total_steps // 2, n // 1024, plan.total_steps - 1):
            assert plan.samples(step).size
            next(iter(plan.deal(rank=1, data_ranks=2, start_step=step)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


# --- StepPlan


@st.composite
def plans(draw: st.DrawFn, max_ranks: int = 64) -> tuple[StepPlan, int]:
    ranks = draw(st.integers(1, max_ranks))
    microbatches = ranks * draw(st.integers(1, 4))
    batch = draw(st.integers(microbatches, 3 * microbatches + 20))
    n = draw(st.integers(1, 400))
    last = draw(st.sampled_from(["pad", "drop"]))
    epochs = draw(st.sampled_from([0.5, 1.0, 1.25, 2.0, 3.0]))
    steps = draw(st.none() | st.integers(1, 12))
    assume(steps or round(epochs * n) >= (batch if last == "drop" else 1))
    return StepPlan(n, draw(SEEDS), batch, microbatches, epochs=epochs, steps=steps, last_step=last), ranks


@given(plans())
@settings(max_examples=100, deadline=None)
def test_no_sample_twice_or_dropped_within_an_epoch(case: tuple[StepPlan, int]) -> None:
    plan, ranks = case
    taken: list[int] = []
    of_ranks = zip(*(plan.deal(rank=rank, data_ranks=ranks) for rank in range(ranks)), strict=True)
    for step, dealt in enumerate(of_ranks):
        assert plan.samples_before(step) == len(taken)
        pieces = [piece for of_rank in dealt for piece in of_rank]
        assert [piece.index for piece in pieces] == list(range(plan.microbatches))
        assert [plan.owner(piece.index, ranks) for piece in pieces] == [r for r, own in enumerate(dealt) for _ in own]
        of_step = [i for piece in pieces if piece.weight for i in piece.indices.tolist()]
        assert len(of_step) == plan.global_batch or step == plan.total_steps - 1
        for piece in pieces:
            if piece.weight:
                assert piece.weight == piece.indices.size / len(of_step)
            else:
                assert piece.indices.tolist() == pieces[0].indices.tolist()
        assert math.isclose(sum(piece.weight for piece in pieces), 1.0, abs_tol=1e-9)
        taken += of_step
    assert len(taken) == plan.total_samples
    for start in range(0, len(taken), plan.n):
        epoch = Counter(taken[start : start + plan.n])
        assert max(epoch.values()) == 1
        if start + plan.n <= len(taken):
            assert len(epoch) == plan.n


@given(n=st.integers(1, 2000), seed=SEEDS, batch=st.integers(64, 300), step=st.integers(0, 30))
@settings(max_examples=5, deadline=None)
def test_a_step_has_the_same_samples_for_1_to_64_ranks(n: int, seed: int, batch: int, step: int) -> None:
    whole = StepPlan(n, seed, batch, 1, steps=40).samples(step).tolist()
    fixed = StepPlan(n, seed, batch, 64, steps=40)
    for ranks in range(1, 65):
        auto = StepPlan(n, seed, batch, ranks, steps=40)  # one microbatch per rank
        assert [i for m in range(ranks) for i in auto.microbatch(step, m)[0].tolist()] == whole
        if 64 % ranks == 0:  # 64 microbatches, dealt to the ranks: not even their cut changes
            dealt = [next(fixed.deal(rank=r, data_ranks=ranks, start_step=step)) for r in range(ranks)]
            pieces = [piece for of_rank in dealt for piece in of_rank]
            assert [piece.index for piece in pieces] == list(range(64))
            assert [i for piece in pieces for i in piece.indices.tolist()] == whole


@given(plans(max_ranks=8), st.data())
@settings(max_examples=80, deadline=None)
def test_resuming_anywhere_gives_the_rest_of_the_uninterrupted_run(
    case: tuple[StepPlan, int], data: st.DataObject
) -> None:
    plan, ranks = case
    start = data.draw(st.integers(0, plan.total_steps))
    for rank in range(ranks):
        whole = list(plan.deal(rank=rank, data_ranks=ranks))
        rest = list(plan.deal(rank=rank, data_ranks=ranks, start_step=start))
        assert len(whole) == plan.total_steps
        assert len(rest) == plan.total_steps - start
        for ours, theirs in zip(rest, whole[start:], strict=True):
            assert [(p.step, p.index, p.weight, p.indices.tolist()) for p in ours] == [
                (p.step, p.index, p.weight, p.indices.tolist()) for p in theirs
            ]


@given(plans(max_ranks=8))
@settings(max_examples=30, deadline=None)
def test_dealing_many_steps_at_once_equals_asking_for_each(case: tuple[StepPlan, int]) -> None:
    plan, ranks = case
    for rank in range(ranks):
        for step, pieces in enumerate(plan.deal(rank=rank, data_ranks=ranks)):
            assert [piece.index for piece in pieces] == list(plan.mine(rank, ranks))
            for piece in pieces:
                indices, weight = plan.microbatch(step, piece.index)
                assert (piece.step, piece.weight) == (step, weight)
                assert piece.indices.tolist() == indices.tolist()
    whole = [i for step in range(plan.total_steps) for i in plan.samples(step).tolist()]
    assert whole == plan.order.indices(0, plan.total_samples).tolist()


def test_lengths() -> None:
    assert StepPlan(100, 0, 32, 2, epochs=1).total_steps == 4
    assert StepPlan(100, 0, 32, 2, epochs=1).samples(3).size == 4
    assert StepPlan(100, 0, 32, 2, epochs=1, last_step="drop").total_steps == 3
    assert StepPlan(100, 0, 32, 2, epochs=8).total_steps == 25
    assert StepPlan(100, 0, 32, 2, epochs=0.25).samples(0).size == 25
    assert StepPlan(10, 0, 32, 2, steps=5).total_samples == 160
    assert StepPlan(10**9, 0, 1000, 8, epochs=0.1).total_steps == 100_000


def test_an_even_cut() -> None:
    plan = StepPlan(100, 0, 10, 4, steps=1)
    assert [plan.microbatch(0, m)[0].size for m in range(4)] == [3, 3, 2, 2]
    short = StepPlan(12, 0, 10, 4, epochs=1)
    assert [(short.microbatch(1, m)[0].size, short.microbatch(1, m)[1]) for m in range(4)] == [
        (1, 0.5),
        (1, 0.5),
        (1, 0.0),
        (1, 0.0),
    ]


@pytest.mark.parametrize(
    ("plan", "where"),
    [
        ({"n": 10, "global_batch": 32, "last_step": "drop"}, "train.epochs"),
        ({"n": 3, "global_batch": 2, "epochs": 0.1}, "train.epochs"),
        ({"n": 0, "global_batch": 2}, "data.split.train"),
        ({"n": 9, "global_batch": 2, "microbatches": 4}, "train.microbatches"),
    ],
)
def test_plans_that_make_no_sense_are_refused(plan: dict[str, object], where: str) -> None:
    with pytest.raises(JobError) as refused:
        StepPlan(**{"seed": 0, "microbatches": 1, **plan})
    assert refused.value.problems[0].where == where


def test_steps_and_ranks_that_do_not_exist_are_refused() -> None:
    plan = StepPlan(100, 0, 10, 4, epochs=1)
    for wrong in (-1, 10):
        with pytest.raises(IndexError):
            plan.samples(wrong)
        with pytest.raises(IndexError):
            plan.microbatch(wrong, 0)
    with pytest.raises(IndexError):
        plan.microbatch(0, 4)
    with pytest.raises(IndexError):
        plan.deal(rank=0, data_ranks=1, start_step=11)
    with pytest.raises(ValueError, match="evenly"):
        plan.mine(0, 3)
