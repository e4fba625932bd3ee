"""Where samples come from, how they are split, and how inputs are normalised."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from dltrain.core.errors import JobError
from dltrain.core.job import DataSpec, Split
from dltrain.data.sources import ArraySource, open_source
from dltrain.data.split import split, split_source


def refusal(spec: DataSpec) -> tuple[str, str]:
    """(where, the whole message) of the refusal."""
    with pytest.raises(JobError) as refused:
        open_source(spec)
    return refused.value.problems[0].where, str(refused.value)


@pytest.fixture
def module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], str]]:
    """Writes a module of the user's and gives its name; it is gone after the test."""
    name = f"users_{abs(hash(request.node.name))}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()  # a folder that was looked into within the same tick of its clock
        return name

    yield write
    sys.modules.pop(name, None)


# --- digits


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    theirs = load_digits()
    source = open_source(DataSpec())
    ours = source.fetch(np.arange(len(source)))
    assert ours["x"].shape == (1797, 1, 8, 8)
    assert (ours["x"].dtype, ours["y"].dtype) == (torch.float32, torch.int64)
    assert np.array_equal(ours["x"].numpy().reshape(-1, 64), theirs["data"])
    assert np.array_equal(ours["y"].numpy(), theirs["target"])


def test_digits_do_not_import_scikit_learn() -> None:
    program = (
        "import sys; from dltrain.core.job import DataSpec; from dltrain.data.sources import open_source;"
        "assert len(open_source(DataSpec())) == 1797; assert not {'sklearn', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # Python's own way to say that a module cannot be imported
    where, message = refusal(DataSpec())
    assert where == "data.source"
    assert "pip install scikit-learn" in message


def test_digits_take_no_options() -> None:
    assert refusal(DataSpec(options={"n": 3})) == ("data.options", "data.options: 'digits' takes no options, not 'n'")


# --- arrays and .npz


def test_fetch_gives_what_was_asked_for_in_that_order() -> None:
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    x.flags.writeable = False
    source = ArraySource({"x": x[:, ::-1], "y": torch.arange(6), "w": np.arange(6, dtype=np.uint8)})
    got = source.fetch(np.array([4, 0, 4]))
    assert got["x"].tolist() == [[9, 8], [1, 0], [9, 8]]
    assert got["y"].tolist() == [4, 0, 4]
    assert got["w"].dtype == torch.uint8
    got["x"].zero_()
    assert source.fetch(np.array([4]))["x"].tolist() == [[9, 8]]


@pytest.mark.parametrize("place", ["local", "memory"])
def test_npz(place: str, tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(7, 3)), np.arange(7)
    stored = io.BytesIO()
    np.savez_compressed(stored, x=x, y=y, mask=y > 3)
    url = str(tmp_path / "data.npz") if place == "local" else "memory://sources/data.npz"
    with fsspec.open(url, "wb") as file:
        file.write(stored.getvalue())
    source = open_source(DataSpec(source=url))
    got = source.fetch(np.array([6, 2]))
    assert np.array_equal(got["x"].numpy(), x[[6, 2]].astype(np.float32))
    assert got["x"].dtype == torch.float32
    assert got["y"].dtype == torch.int64
    assert got["mask"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, "'x' [3, 2], 'y' [4]"),
        ({"x": np.zeros(())}, "differ in length"),
        ({"x": np.array(["a", "b"])}, "dtype <U1"),
        ({"x": np.zeros(0)}, "no samples"),
        ({}, "no array"),
        ({"x": np.array([{"a": 1}], dtype=object)}, "allow_pickle=False"),
    ],
)
def test_npz_files_that_cannot_be_used(arrays: dict[str, np.ndarray], says: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    where, message = refusal(DataSpec(source=str(tmp_path / "a.npz")))
    assert where == "data.source"
    assert says in message


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04broken", b"\x80\x04K\x01."])
def test_files_that_are_no_npz(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    where, message = refusal(DataSpec(source=str(tmp_path / "a.npz")))
    assert where == "data.source"
    assert "cannot be read as npz" in message


def test_a_damaged_npz_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, x=np.arange(1000.0))
    raw = bytearray(file.read_bytes())
    raw[4000] ^= 1
    file.write_bytes(raw)
    assert "cannot be read as npz" in refusal(DataSpec(source=str(file)))[1]


def test_a_bare_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    assert "numpy.savez" in refusal(DataSpec(source=str(tmp_path / "a.npz")))[1]


def test_missing_files_and_unknown_sources(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", x=np.zeros(3))
    where, message = refusal(DataSpec(source=str(tmp_path / "trian.npz")))
    assert where == "data.source"
    assert "no such file" in message
    assert "train.npz" in message
    assert "no such file" in refusal(DataSpec(source="memory://sources/none.npz"))[1]
    assert "unknown protocol 'nope'" in refusal(DataSpec(source="nope://bucket/a.npz"))[1]
    assert "did you mean 'digits'" in refusal(DataSpec(source="digit"))[1]
    assert refusal(DataSpec(source=str(tmp_path / "train.npz"), options={"key": 1})) == (
        "data.options.key",
        "data.options.key: expected the name of an array or file, found the number 1",
    )


# --- module:function

DATASETS = """
import numpy as np, torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

class Pairs(Dataset):
    def __init__(self, n=5): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full((2,), float(i)), i

class Dicts(Pairs):
    def __getitem__(self, i): return {"tokens": np.full(3, i), "weight": i / 2}

class Many(Pairs):
    asked = []
    def __getitems__(self, indices):
        assert all(type(i) is int for i in indices)
        self.asked.append(indices)
        return [self[i] for i in indices]

class Own:
    def __len__(self): return 4
    def fetch(self, indices): return {"x": torch.from_numpy(indices)}

class Lone(Pairs):
    def __getitem__(self, i): return torch.tensor(float(i))

class Words(Pairs):
    def __getitem__(self, i): return {"x": 1.0, "word": "w"}

class Triples(Pairs):
    def __getitem__(self, i): return 1, 2, 3

class Ragged(Pairs):
    def __getitem__(self, i): return torch.zeros(i)

class Broken(Pairs):
    def __getitem__(self, i): raise OSError("no such image")

class Stream(IterableDataset):
    def __len__(self): return 3
    def __iter__(self): return iter([1, 2, 3])

class Odd(Own):
    def fetch(self, indices): return torch.zeros(len(indices))

class Long(Own):
    def fetch(self, indices): return {"x": torch.zeros(9)}

class Keyed(Pairs):
    def sample_keys(self, indices): return np.array([[11, 22, 33, 44, 55][i] for i in indices], dtype=np.uint64)

class Unkeyed(Own):
    def sample_keys(self, indices): return indices / 2

def arrays(): return {"x": np.zeros((6, 2), np.float32), "y": torch.arange(6)}
def tensors(): return TensorDataset(torch.arange(8.0), torch.arange(8))
def a_list(): return [(float(i), i) for i in range(3)]
def nothing(): return None
def text(): return "abc"
def fails(): raise RuntimeError("disk on fire")
CONSTANT = 3
"""


@pytest.mark.parametrize(
    ("function", "length", "at_2"),
    [
        ("Pairs", 5, {"x": [2.0, 2.0], "y": 2}),
        ("Dicts", 5, {"tokens": [2, 2, 2], "weight": 1.0}),
        ("Many", 5, {"x": [2.0, 2.0], "y": 2}),
        ("Own", 4, {"x": 2}),
        ("Lone", 5, {"x": 2.0}),
        ("arrays", 6, {"x": [0.0, 0.0], "y": 2}),
        ("tensors", 8, {"x": 2.0, "y": 2}),
        ("a_list", 3, {"x": 2.0, "y": 2}),
    ],
)
def test_users_data_sets(module: Callable[[str], str], function: str, length: int, at_2: dict[str, Any]) -> None:
    source = open_source(DataSpec(source=f"{module(DATASETS)}:{function}"))
    assert len(source) == length
    got = source.fetch(np.array([2, 0]))
    assert {key: value[0].tolist() for key, value in got.items()} == at_2
    assert all(len(value) == 2 for value in got.values())


def test_users_options_reach_the_function(module: Callable[[str], str]) -> None:
    name = module(DATASETS)
    assert len(open_source(DataSpec(source=f"{name}:Pairs", options={"n": 9}))) == 9
    where, message = refusal(DataSpec(source=f"{name}:Pairs", options={"m": 9}))
    assert where == "data.options"
    assert "'m'" in message


def test_many_samples_are_asked_for_at_once(module: Callable[[str], str]) -> None:
    name = module(DATASETS)
    source = open_source(DataSpec(source=f"{name}:Many"))
    source.fetch(np.array([3, 1, 2]))
    assert sys.modules[name].Many.asked[-1] == [3, 1, 2]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("Words", "'word' does not collate to a tensor"),
        ("Triples", "neither a tensor, nor a pair"),
        ("Broken", "OSError: no such image"),
        ("Stream", "Stream, which cannot be read by index"),
        ("Odd", "fetch() gave a Tensor"),
        ("Long", "no tensor of one sample for 'x'"),
        ("Unkeyed", "sample_keys() of one index gave float64 [1]"),
        ("nothing", "NoneType, which cannot be read by index"),
        ("text", "str, which cannot be read by index"),
        ("fails", "RuntimeError: disk on fire"),
        ("CONSTANT", "is a int"),
        ("Pair", "did you mean 'Pairs'"),
    ],
)
def test_users_mistakes(module: Callable[[str], str], function: str, says: str) -> None:
    where, message = refusal(DataSpec(source=f"{module(DATASETS)}:{function}"))
    assert where == "data.source"
    assert says in message


def test_a_data_set_with_keys_is_split_by_them(module: Callable[[str], str]) -> None:
    halves = Split(train=0.5, val=0.5, test=0.0)
    source = open_source(DataSpec(source=f"{module(DATASETS)}:Keyed"))
    keys = [11, 22, 33, 44, 55]
    of_keys = split(56, halves)  # a key is dealt like the index of that number
    expected = {name: [i for i, key in enumerate(keys) if key in of_keys[name]] for name in of_keys}
    assert {name: list(part) for name, part in split_source(source, halves).items()} == expected
    assert expected["train"]
    assert expected["val"]


def test_an_empty_data_set_is_refused(module: Callable[[str], str]) -> None:
    assert "no samples" in refusal(DataSpec(source=f"{module(DATASETS)}:Pairs", options={"n": 0}))[1]


def test_modules_that_do_not_import(module: Callable[[str], str]) -> None:
    assert refusal(DataSpec(source="no_such_module_at_all:f"))[0] == "data.source"
    broken = module("import no_such_dependency\n")
    where, message = refusal(DataSpec(source=f"{broken}:f"))
    assert where == "data.source"
    assert "no_such_dependency" in message
