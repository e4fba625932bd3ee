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
from dltrain.data.split import split_source
from dltrain.data.stdlib_text import modules
from sklearn import datasets

WHOLE = Split(train=1.0, val=0.0, test=0.0)
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


def test_the_text_is_the_standard_librarys_source() -> None:
    texts = modules()
    root = Path(sysconfig.get_path("stdlib"))
    assert texts[0] == (root / "__future__.py").read_text("utf-8")
    named = ("json/decoder.py", "asyncio/tasks.py", "zipfile.py")
    assert {(root / name).read_bytes().decode() for name in named} <= set(texts)
    assert sum(map(len, texts)) > 5_000_000
    assert not [text for text in texts if "site-packages/" in text[:200]]


def held_out(**options: Any) -> dict[str, torch.Tensor]:
    """The test part's windows."""
    source = open_source(DataSpec(source="stdlib_text", options=options, split=TEXT))
    return source.fetch(np.asarray(split_source(source, TEXT)["test"]))


def test_bytes_are_the_modules_in_blocks_that_one_part_has() -> None:
    stream = "".join(f"{text}\0" for text in modules()).encode()
    source = open_source(DataSpec(source="stdlib_text", options={"length": 100}, split=WHOLE))
    got = source.fetch(np.arange(len(source)))
    assert got.keys() == {"x", "y"}
    assert bytes(got["y"].flatten().tolist()) == stream[1 : len(source) * 100 + 1]
    assert len(stream) - len(source) * 100 <= 100
    test = bytes(held_out(length=1)["y"].flatten().tolist())
    assert 0.15 < len(test) / len(stream) < 0.25
    assert sum(test[i : i + 1000] in stream for i in range(0, 100_000, 1000)) > 60  # but at the seams


@pytest.mark.slow
def test_bpe_holds_out_the_same_text() -> None:
    test = held_out(length=1)["y"]
    got = held_out(length=64, tokenizer="bpe", vocab=300)
    assert got["x"].shape == got["y"].shape
    assert 256 <= int(got["y"].max()) < 300
    assert 0.999 * len(test) < int(got["bytes"].sum()) < len(test)
    assert int(got["bytes"].sum()) > 1.2 * got["y"].numel()


@pytest.mark.slow
def test_bpe_is_learned_from_the_training_part_alone() -> None:
    """The same text makes another number of tokens where less of it is to train on."""

    def tokens(share: float) -> int:
        split = Split(train=share, val=0.0, test=1 - share)
        options = {"tokenizer": "bpe", "vocab": 300, "length": 1}
        return len(open_source(DataSpec(source="stdlib_text", options=options, split=split)))

    assert abs(tokens(0.01) - tokens(0.1)) > 10


def test_bpe_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(JobError, match=r"data.options.tokenizer: this needs the package tokenizers"):
        open_source(DataSpec(source="stdlib_text", options={"tokenizer": "bpe"}))


@pytest.mark.parametrize(
    ("source", "options", "where", "says"),
    [
        ("iris", {"n": 3}, "data.options", "'iris' takes no options, not 'n'"),
        ("stdlib_text", {"lenght": 3}, "data.options.lenght", "did you mean 'length'?"),
        ("stdlib_text", {"length": "8"}, "data.options.length", "expected a whole number above 0, found the text '8'"),
        ("stdlib_text", {"vocab": 300}, "data.options", "'vocab' is of use to the tokenizer 'bpe' only"),
        ("stdlib_text", {"length": 10**9}, "data.options.length", "a window takes 1000000001"),
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
