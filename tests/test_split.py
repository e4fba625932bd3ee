"""How samples are dealt to training, validation and test, and how inputs are normalised."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from dltrain.core.errors import JobError
from dltrain.core.job import DataSpec, Split
from dltrain.data.normalize import Normalizer
from dltrain.data.sources import ArraySource, open_source
from dltrain.data.split import Subset, split
from hypothesis import given, settings
from hypothesis import strategies as st

# --- split

SHARES = st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (0.9, 0.0, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1)])


def spec(train: float, val: float, test: float) -> Split:
    return Split(train=train, val=val, test=test)


@given(n=st.integers(50, 5000), more=st.integers(0, 3000), shares=SHARES)
@settings(max_examples=60, deadline=None)
def test_every_sample_is_in_one_part_and_stays_there(n: int, more: int, shares: tuple[float, float, float]) -> None:
    now, later = split(n, spec(*shares)), split(n + more, spec(*shares))
    assert sorted(i for part in now.values() for i in part) == list(range(n))
    for name, part in now.items():
        assert np.array_equal(part, np.asarray(later[name])[: len(part)])
        assert np.asarray(later[name])[len(part) :].min(initial=n) >= n


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (0.98, 0.01, 0.01)])
def test_shares_hold_and_parts_are_spread_evenly(shares: tuple[float, float, float]) -> None:
    n = 2_500_000  # more than one chunk
    for part, share in zip(split(n, spec(*shares)).values(), shares, strict=True):
        assert abs(len(part) - n * share) <= 4.5 * (n * share * (1 - share)) ** 0.5
        if share:
            by_place = np.histogram(part, bins=100, range=(0, n))[0]
            assert abs(by_place - n * share / 100).max() <= 5 * (n / 100 * share * (1 - share)) ** 0.5 + 1
            assert part.dtype == np.int64


def test_the_split_never_changes_between_releases() -> None:
    parts = split(1797, Split())
    assert {name: len(part) for name, part in parts.items()} == {"train": 1456, "val": 167, "test": 174}
    assert parts["val"][:5].tolist() == [6, 48, 63, 68, 69]


def test_training_on_everything_costs_no_memory() -> None:
    assert split(10**12, spec(1.0, 0.0, 0.0)) == {"train": range(10**12), "val": range(0), "test": range(0)}


def test_an_empty_training_part_is_refused() -> None:
    for n, shares in ((0, spec(1.0, 0.0, 0.0)), (0, Split()), (1, spec(0.001, 0.999, 0.0))):
        with pytest.raises(JobError) as refused:
            split(n, shares)
        assert refused.value.problems[0].where == "data.split.train"


def test_subset() -> None:
    source = ArraySource({"x": np.arange(100)})
    for indices in (np.array([7, 90, 3]), range(7, 90, 5), range(100), range(20)):
        view = Subset(source, indices)
        places = np.array([2, 0, 1])
        assert len(view) == len(indices)
        assert view.fetch(places)["x"].tolist() == [indices[2], indices[0], indices[1]]


# --- normalize


@given(
    n=st.integers(1, 9000),
    mean=st.floats(-1e4, 1e4),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_fit_is_the_exact_mean_and_deviation(n: int, mean: float, scale: float, seed: int) -> None:
    x = np.random.default_rng(seed).normal(mean, scale, size=(n, 3))
    fitted = Normalizer.fit(ArraySource({"x": x[:, None]}), range(n))
    assert fitted.mean == pytest.approx(x.mean(), rel=1e-12, abs=1e-12)
    assert fitted.std == pytest.approx(x.std(), rel=1e-9)
    by_feature = Normalizer.fit(ArraySource({"x": x}), range(n))
    assert by_feature.mean == pytest.approx(x.mean(0), rel=1e-12, abs=1e-12)
    assert by_feature.std == pytest.approx([s if s > 0 else 1.0 for s in x.std(0)], rel=1e-9)


def test_only_the_given_samples_count() -> None:
    x = np.random.default_rng(1).normal(size=(20_000, 2)).astype(np.float32)
    indices = np.flatnonzero(np.arange(20_000) % 3)
    changed = x.copy()
    changed[::3] = np.nan
    fitted = Normalizer.fit(ArraySource({"x": x}), indices)
    assert fitted == Normalizer.fit(ArraySource({"x": changed}), indices)
    assert fitted == Normalizer.fit(ArraySource({"x": x[indices]}), range(len(indices)))
    assert fitted != Normalizer.fit(ArraySource({"x": x}), range(len(x)))
    with pytest.raises(JobError, match="NaN"):
        Normalizer.fit(ArraySource({"x": changed}), range(len(x)))


def test_apply_gives_zero_mean_and_unit_variance_and_leaves_the_rest_alone() -> None:
    source = open_source(DataSpec())
    fields = source.fetch(np.arange(1797))
    before = fields["x"].clone()
    got = Normalizer.fit(source, range(1797)).apply(fields)
    assert abs(float(got["x"].double().mean())) < 1e-6
    assert float(got["x"].double().std(correction=0)) == pytest.approx(1, rel=1e-6)
    assert got["x"].dtype == torch.float32
    assert got["y"] is fields["y"]
    assert torch.equal(fields["x"], before)


@pytest.mark.parametrize("value", [0.0, 0.1, -12345.678, 1e30])
def test_a_constant_input_becomes_zero(value: float) -> None:
    source = ArraySource({"x": np.full((5000, 3), value, dtype=np.float32)})
    fitted = Normalizer.fit(source, range(5000))
    assert fitted.std == (1.0, 1.0, 1.0)
    assert not fitted.apply(source.fetch(np.arange(10)))["x"].any()
    of_all = Normalizer.fit(ArraySource({"x": source.arrays["x"][:, :, None]}), range(5000))
    assert of_all.std == 1.0


def test_each_feature_of_a_table_is_scaled_on_its_own() -> None:
    table = np.random.default_rng(2).normal([0, 5, -3e4], [1e-3, 1, 1e5], size=(9000, 3)).astype(np.float32)
    source = ArraySource({"x": table})
    got = Normalizer.fit(source, range(9000)).apply(source.fetch(np.arange(9000)))["x"].double()
    assert got.mean(0).abs().max() < 1e-5
    assert (got.std(0, correction=0) - 1).abs().max() < 1e-5
    halves = Normalizer.fit(source, range(9000)).apply({"x": torch.from_numpy(table).bfloat16()})["x"]
    assert halves.dtype == torch.bfloat16
    assert (halves.double() - got).abs().max() < 0.1


def test_a_table_of_other_features_is_refused() -> None:
    fitted = Normalizer.fit(ArraySource({"x": np.zeros((5, 3))}), range(5))
    with pytest.raises(JobError, match=r"\[5, 4\] is no table of the 3 features"):
        fitted.apply({"x": torch.zeros(5, 4)})


def test_other_inputs_are_left_alone() -> None:
    for arrays in ({"x": np.arange(5)}, {"image": np.arange(5.0)}, {"x": np.zeros((5, 0))}):
        source = ArraySource(arrays)
        fitted = Normalizer.fit(source, range(5))
        assert fitted == Normalizer()
        fields = source.fetch(np.arange(5))
        got = fitted.apply(fields)
        assert all(torch.equal(got[key], fields[key]) for key in arrays)
    assert Normalizer.fit(ArraySource({"x": np.arange(5.0)}), range(0)) == Normalizer()


def test_half_precision_keeps_its_dtype() -> None:
    x = torch.arange(8, dtype=torch.bfloat16)
    got = Normalizer(3.5, 2.0).apply({"x": x})["x"]
    assert got.dtype == torch.bfloat16
    assert got.tolist() == ((x - 3.5) / 2).tolist()


def test_the_state_survives_json_to_the_bit() -> None:
    for name in ("digits", "wine"):
        source = open_source(DataSpec(source=name))
        fitted = Normalizer.fit(source, range(0, len(source), 2))
        again = Normalizer.from_state(json.loads(json.dumps(fitted.state())))
        assert again == fitted
        fields = source.fetch(np.arange(10))
        assert torch.equal(again.apply(fields)["x"], fitted.apply(fields)["x"])


def test_every_process_fits_the_same_bits_whatever_its_threads() -> None:
    program = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[1]));"
        "from dltrain.core.job import DataSpec; from dltrain.data.sources import open_source;"
        "from dltrain.data.normalize import Normalizer; n = Normalizer.fit(open_source(DataSpec()), range(3, 1797));"
        "print(n.mean.hex(), n.std.hex())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", program, threads], check=True, timeout=60, capture_output=True).stdout
        for threads in ("1", "2", "7")
    }
    assert len(outputs) == 1
    assert b"0x" in outputs.pop()


def test_the_columns_of_a_table_are_normalised_each_by_itself() -> None:
    x = np.random.default_rng(5).normal(size=(9000, 3)) * [1, 1000, 0] + [5, 0, 3]
    table = ArraySource({"x": x})
    fitted = Normalizer.fit(table, range(1, 9000))
    assert fitted.mean == pytest.approx(x[1:].mean(axis=0), rel=1e-12, abs=1e-12)
    assert fitted.std == pytest.approx((*x[1:, :2].std(axis=0), 1.0), rel=1e-9)
    assert Normalizer.from_state(json.loads(json.dumps(fitted.state()))) == fitted
    got = fitted.apply({"x": torch.from_numpy(x[1:])})["x"]
    torch.testing.assert_close(got.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.std(0, correction=0)[:2], torch.ones(2, dtype=torch.float64))
    assert not got[:, 2].any()
    with pytest.raises(JobError, match=r"\[5, 4\] is no table of the 3 features"):
        fitted.apply({"x": torch.zeros(5, 4)})
