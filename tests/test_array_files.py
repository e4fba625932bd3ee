"""Arrays from .npz, .npy, .safetensors and IDX files, local and in S3."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from dltrain.core.job import DataSpec
from dltrain.core.storage import Storage
from dltrain.data.sources import open_source
from sources import idx_file, refusal, resident


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=array.dtype == object)
    return content.getvalue()


# --- .npz


def test_options_choose_arrays_of_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.ones((3, 2)), labels=np.arange(3), rest=np.zeros(7))
    source = str(tmp_path / "a.npz")
    got = open_source(DataSpec(source=source, options={"x": "images", "y": "labels"})).fetch(np.array([2]))
    assert (got["x"].tolist(), got["y"].tolist(), len(got)) == ([[1, 1]], [2], 2)
    where, message = refusal(source, x="image")
    assert where == "data.options.x"
    assert "did you mean 'images'?" in message
    assert refusal(source, y=3)[0] == "data.options.y"


# --- .npy


def test_npy(storage: Storage) -> None:
    x, y = np.random.default_rng(0).normal(size=(5, 3)), np.arange(5, dtype=">i4")
    storage.write("x.npy", [npy(x)])
    storage.write("y.npy", [npy(y)])
    source = open_source(DataSpec(source=f"{storage}/x.npy", options={"y": f"{storage}/y.npy"}))
    got = source.fetch(np.array([4, 1]))
    assert got["x"].dtype == torch.float32
    assert np.array_equal(got["x"].numpy(), x[[4, 1]].astype(np.float32))
    assert (got["y"].dtype, got["y"].tolist()) == (torch.int32, [4, 1])


def test_a_large_npy_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(1 << 28, 4))  # a hole of 4 GiB
    array[123_456_789] = [1, 2, 3, 4]
    array.flush()
    del array
    before = resident()
    source = open_source(DataSpec(source=str(path)))
    assert source.fetch(np.array([123_456_789]))["x"].tolist() == [[1, 2, 3, 4]]
    assert len(source) == 1 << 28
    assert resident() - before < 64 << 20


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "does not begin as one"),
        (b"\x80\x04K\x01.", "does not begin as one"),
        (npy(np.zeros(8))[:-3], "cannot be read as npy"),
        (npy(np.array([{"a": 1}], dtype=object)), "Python objects"),
        (npy(np.zeros(())), "differ in length"),
        (npy(np.zeros(0)), "no samples"),
    ],
)
def test_npy_files_that_cannot_be_used(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    where, message = refusal(str(tmp_path / "a.npy"))
    assert where == "data.source"
    assert says in message


def test_npy_files_that_do_not_go_together(tmp_path: Path) -> None:
    for name, length in (("x", 3), ("labels", 4)):
        np.save(tmp_path / f"{name}.npy", np.zeros(length))
    source = str(tmp_path / "x.npy")
    assert "differ in length: 'x' [3], 'y' [4]" in refusal(source, y=str(tmp_path / "labels.npy"))[1]
    where, message = refusal(source, y=str(tmp_path / "label.npy"))
    assert where == "data.options.y"
    assert f"did you mean '{tmp_path / 'labels.npy'}'?" in message


# --- .safetensors


def test_safetensors(storage: Storage) -> None:
    x, y = torch.randn(6, 2, dtype=torch.float64), torch.arange(6)
    half = torch.randn(6).to(torch.bfloat16)
    storage.write("a.safetensors", [safetensors.torch.save({"x": x, "labels": y, "half": half})])
    got = open_source(DataSpec(source=f"{storage}/a.safetensors")).fetch(np.array([5, 0]))
    assert got.keys() == {"x", "labels", "half"}
    assert torch.equal(got["x"], x[[5, 0]].float())
    assert torch.equal(got["half"], half[[5, 0]].float())
    chosen = open_source(DataSpec(source=f"{storage}/a.safetensors", options={"y": "labels"})).fetch(np.array([3]))
    assert {key: value.tolist() for key, value in chosen.items()} == {"y": [3]}


@pytest.mark.parametrize("content", [b"", b"nonsense nonsense", safetensors.torch.save({"x": torch.ones(9)})[:-1]])
def test_files_that_are_no_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert "cannot be read as safetensors" in refusal(str(tmp_path / "a.safetensors"))[1]


# --- IDX

IMAGES = np.random.default_rng(1).integers(0, 256, size=(7, 4, 5), dtype=np.uint8)
LABELS = np.arange(7, dtype=np.uint8)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_folder_of_the_mnist_family(storage: Storage, packed: bool) -> None:
    pack, gz = (gzip.compress, ".gz") if packed else (bytes, "")
    for part, begin, end in (("train", 0, 5), ("t10k", 5, 7)):
        storage.write(f"{part}-images-idx3-ubyte{gz}", [pack(idx_file(IMAGES[begin:end]))])
        storage.write(f"{part}-labels-idx1-ubyte{gz}", [pack(idx_file(LABELS[begin:end]))])
    for part, indices in (("train", range(5)), ("test", range(5, 7)), ("all", range(7))):
        source = open_source(DataSpec(source=str(storage), options={"part": part}))
        got = source.fetch(np.arange(len(source)))
        assert (got["x"].dtype, got["y"].dtype) == (torch.float32, torch.int64)
        assert got["y"].tolist() == list(indices)
        expected = torch.tensor(IMAGES[indices.start : indices.stop], dtype=torch.float32)[:, None] / 255
        assert torch.equal(got["x"], expected)


def test_a_pair_of_idx_files(storage: Storage) -> None:
    storage.write("train-images-idx3-ubyte", [idx_file(IMAGES)])
    storage.write("train-labels-idx1-ubyte", [idx_file(LABELS)])
    storage.write("other.idx", [idx_file(LABELS[::-1].astype(">i4"))])
    source = f"{storage}/train-images-idx3-ubyte"
    assert open_source(DataSpec(source=source)).fetch(np.array([3]))["y"].tolist() == [3]
    other = DataSpec(source=source, options={"y": f"{storage}/other.idx"})
    assert open_source(other).fetch(np.array([0]))["y"].tolist() == [6]


def test_idx_numbers_of_other_types_stay_what_they_are(tmp_path: Path) -> None:
    series = np.linspace(-1, 1, 12, dtype=">f4").reshape(4, 3)
    (tmp_path / "series.idx").write_bytes(idx_file(series))
    source = open_source(DataSpec(source=str(tmp_path / "series.idx"), format="idx"))
    assert np.array_equal(source.fetch(np.arange(4))["x"].numpy(), series.astype(np.float32))


WHOLE = idx_file(IMAGES)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (WHOLE[:-1], "its header tells of 140 bytes [7, 4, 5], there are 139"),
        (WHOLE + b"\0", "there are 141"),
        (WHOLE[:9], "it ends within its header"),
        (b"", "it does not begin as one"),
        (b"\x80\x04K\x01.", "it does not begin as one"),
        (struct.pack(">BBBB", 0, 0, 7, 1) + bytes(4), "it does not begin as one"),
        (gzip.compress(WHOLE, mtime=0)[:-6], "ended before"),
        (gzip.compress(WHOLE, mtime=0)[:30] + b"\xff" * 40, "cannot be read as idx"),
    ],
)
def test_damaged_idx_files(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx_file(LABELS))
    assert says in refusal(str(tmp_path))[1]


def test_idx_folders_that_are_not_clear(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(WHOLE)
    assert "no such file" in refusal(str(tmp_path))[1]
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_file(LABELS[1:]))
    assert "differ in length" in refusal(str(tmp_path))[1]
    assert "no IDX images of the part 'test'" in refusal(str(tmp_path), part="test")[1]
    (tmp_path / "letters-train-images-idx3-ubyte").write_bytes(WHOLE)
    assert "several sets" in refusal(str(tmp_path))[1]
    assert refusal(str(tmp_path), part="tset") == (
        "data.options.part",
        "data.options.part: expected 'train', 'test' or 'all', found the text 'tset' (did you mean 'test'?)",
    )


# --- what is found


def test_folders_whose_format_is_not_clear(tmp_path: Path) -> None:
    assert "is empty" in refusal(str(tmp_path))[1]
    (tmp_path / "notes.pdf").touch()
    assert "no file's ending tells a format" in refusal(str(tmp_path))[1]
    np.save(tmp_path / "a.npy", np.zeros(2))
    np.save(tmp_path / "b.npy", np.zeros(2))
    assert "holds 2 npy files" in refusal(str(tmp_path))[1]
    np.savez(tmp_path / "c.npz", x=np.zeros(2))
    assert "several formats: npy, npz" in refusal(str(tmp_path))[1]
    assert len(open_source(DataSpec(source=str(tmp_path), format="npz"))) == 2
    assert "known: .csv" in refusal(str(tmp_path / "notes.pdf"))[1]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    assert "pip install 'dltrain[tables]'" in refusal(str(tmp_path / "a.csv"))[1]
