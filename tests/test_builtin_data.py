"""The built-in data sets against scikit-learn's own loaders, and the text against the files it is made of."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dltrain.core.checks import check_references
from dltrain.core.errors import JobError
from dltrain.core.job import DataSpec, Job, Split
from dltrain.data.builtin import BUILT_IN
from dltrain.data.sources import open_source
from dltrain.data.split import split
from dltrain.data.stdlib_text import TokenWindows, corpus
from sklearn import datasets

TEXT = Split(train=0.6, val=0.2, test=0.2)


def everything(name: str, **options: Any) -> dict[str, torch.Tensor]:
    source = open_source(DataSpec(source=name, options=options))
    return source.fetch(np.arange(len(source)))


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer"])
def test_tables_of_classes_are_scikit_learns(name: str) -> None:
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    ours = everything(name)
    assert np.array_equal(ours["x"].numpy(), x.astype(np.float32))
    assert np.array_equal(ours["y"].numpy(), y)
    assert (ours["x"].dtype, ours["y"].dtype) == (torch.float32, torch.int64)


def test_diabetes_is_scikit_learns_as_measured() -> None:
    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)
    ours = everything("diabetes")
    assert np.array_equal(ours["x"].numpy(), x.astype(np.float32))
    assert np.array_equal(ours["y"].numpy(), y.astype(np.float32))


@pytest.mark.parametrize(("history", "horizon"), [(56, 8), (100, 3)])
def test_the_scan_of_the_digits_is_cut_without_overlap(history: int, horizon: int) -> None:
    series = datasets.load_digits().data.ravel()
    ours = everything("digits_scan", history=history, horizon=horizon)
    n = len(series) // (history + horizon)
    assert ours["x"].shape == (n, history, 1)
    assert ours["y"].shape == (n, horizon)
    joined = torch.cat([ours["x"][:, :, 0], ours["y"]], dim=1).ravel()
    assert np.array_equal(joined.numpy(), series[: len(joined)].astype(np.float32))


def test_a_window_of_the_default_scan_is_a_digit() -> None:
    ours, images = everything("digits_scan"), datasets.load_digits().images
    assert np.array_equal(ours["y"].numpy(), images[:, 7])


def test_the_corpus_is_the_standard_librarys_source() -> None:
    text = corpus()
    root = Path(sysconfig.get_path("stdlib"))
    files = text.split(b"\0")
    assert files[0] == (root / "__future__.py").read_bytes()
    assert {(root / name).read_bytes() for name in ("json/decoder.py", "asyncio/tasks.py", "zipfile.py")} <= set(files)
    assert len(text) > 5_000_000
    assert not [file for file in files if b"site-packages/" in file[:200]]
    assert corpus() == text


def test_bytes_are_cut_into_windows_that_share_no_target() -> None:
    text = corpus()
    source = open_source(DataSpec(source="stdlib_text", options={"length": 100}))
    assert isinstance(source, TokenWindows)
    assert len(source) == (len(text) - 1) // 100
    got = source.fetch(np.array([0, 1, 7, len(source) - 1]))
    assert got.keys() == {"x", "y"}
    for place, x, y in zip((0, 1, 7, len(source) - 1), got["x"], got["y"], strict=True):
        assert bytes(x.tolist()) == text[100 * place : 100 * place + 100]
        assert bytes(y.tolist()) == text[100 * place + 1 : 100 * place + 101] == source.spell(place)
    assert b"".join(source.spell(i) for i in range(50)) == text[1:5001]
    wide = open_source(DataSpec(source="stdlib_text", options={"length": 100, "stride": 1000}))
    assert len(wide) == (len(text) - 101) // 1000 + 1
    assert torch.equal(wide.fetch(np.array([7]))["x"], source.fetch(np.array([70]))["x"])


@pytest.fixture(scope="module")
def bpe() -> TokenWindows:
    options = {"tokenizer": "bpe", "vocab": 300, "length": 64}
    source = open_source(DataSpec(source="stdlib_text", options=options, split=TEXT))
    assert isinstance(source, TokenWindows)
    return source


@pytest.mark.slow
def test_bpe_counts_the_bytes_that_it_spells(bpe: TokenWindows) -> None:
    picked = np.random.default_rng(0).choice(len(bpe), 200)
    got = bpe.fetch(picked)
    assert got["x"].shape == got["y"].shape == (200, 64)
    assert torch.equal(got["x"][:, 1:], got["y"][:, :-1])
    assert 256 <= int(got["y"].max()) < 300
    assert got["bytes"].tolist() == [len(bpe.spell(int(i))) for i in picked]
    assert int(got["bytes"].sum()) > 1.2 * got["y"].numel()


@pytest.mark.slow
def test_bpe_leaves_every_part_the_text_that_was_dealt_to_it(bpe: TokenWindows) -> None:
    """A tokenizer that has seen nothing of the test text: the parts are dealt in blocks before there are tokens."""
    text = corpus()
    blocks = [text[i : i + 4096] for i in range(0, len(text), 4096)]
    dealt = {name: b"".join(blocks[i] for i in indices) for name, indices in split(len(blocks), TEXT).items()}
    spelt = dict.fromkeys(dealt, 0)
    for name, indices in split(len(bpe), TEXT).items():
        place = 0
        for index in indices:
            found = dealt[name].find(bpe.spell(int(index)), place)
            assert found - place in (range(1, 50) if place == 0 else (0,))  # the first token of all is no target
            place = found + len(bpe.spell(int(index)))
        spelt[name] = place
    assert all(spelt[name] > 0.9 * len(dealt[name]) for name in dealt)


def test_bpe_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(JobError, match=r"data.options.tokenizer: 'bpe' needs the package tokenizers"):
        open_source(DataSpec(source="stdlib_text", options={"tokenizer": "bpe"}))


@pytest.mark.parametrize(
    ("source", "options", "where", "says"),
    [
        ("iris", {"n": 3}, "data.options", "'iris' takes no options, not 'n'"),
        ("stdlib_text", {"lenght": 3}, "data.options.lenght", "did you mean 'length'?"),
        ("stdlib_text", {"length": "8"}, "data.options.length", "expected a whole number above 0, found the text '8'"),
        ("stdlib_text", {"stride": 8}, "data.options", "a stride of 8 makes windows of 256 tokens overlap"),
        ("stdlib_text", {"vocab": 300}, "data.options", "'vocab' is of use to the tokenizer 'bpe' only"),
        ("stdlib_text", {"length": 10**9}, "data.options.length", "no text is long enough"),
        ("digits_scan", {"history": 0}, "data.options.history", "expected a whole number above 0"),
        ("digits_scan", {"history": 200_000}, "data.options", "the series has 115008"),
    ],
)
def test_options_are_checked(source: str, options: dict[str, Any], where: str, says: str) -> None:
    with pytest.raises(JobError) as refused:
        open_source(DataSpec(source=source, options=options))
    assert refused.value.problems[0].where == where
    assert says in str(refused.value)


def test_checks_before_anything_starts_know_every_data_set() -> None:
    for name in BUILT_IN:
        assert check_references(Job(data=DataSpec(source=name))) == []
        (problem,) = check_references(Job(data=DataSpec(source=name[:-1] + "x")))
        assert problem.hint == f"did you mean '{name}'?"
    (problem,) = check_references(Job(data=DataSpec(source="qqq")))
    assert all(name in problem.hint for name in BUILT_IN)
    assert all(f"'{name}'" in (DataSpec.model_fields["source"].description or "") for name in BUILT_IN)
