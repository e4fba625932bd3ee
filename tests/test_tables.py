"""CSV and Parquet: features, targets, classes; what is refused; a split that follows the rows."""

from __future__ import annotations

import csv
import gzip
import io
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dltrain.core.job import DataSpec
from dltrain.core.storage import Storage
from dltrain.data.sources import ArraySource, open_source
from sources import parts_of, refusal

FLOWERS = """\
petal,sepal,wild,label
1.5,2,true,rose
0.25,3,false,daisy
-7,4,true,rose
1e3,5,false,tulip
"""
X = [[1.5, 2, 1], [0.25, 3, 0], [-7, 4, 1], [1000, 5, 0]]


def opened(source: str, **options: Any) -> tuple[ArraySource, dict[str, torch.Tensor]]:
    source_ = open_source(DataSpec(source=source, options=options))
    assert isinstance(source_, ArraySource)
    return source_, source_.fetch(np.arange(len(source_)))


def parquet(**columns: Any) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    return content.getvalue()


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv"])
def test_csv(storage: Storage, ending: str) -> None:
    text = FLOWERS.replace(",", "\t") if ending == "tsv" else FLOWERS
    storage.write(f"a.{ending}", [gzip.compress(text.encode()) if ending.endswith("gz") else text.encode()])
    source, got = opened(f"{storage}/a.{ending}")
    assert got["x"].dtype == torch.float32
    assert got["x"].tolist() == X
    assert (got["y"].dtype, got["y"].tolist()) == (torch.int64, [1, 0, 1, 2])
    assert source.classes == ("daisy", "rose", "tulip")


def test_parquet(storage: Storage) -> None:
    storage.write("b.parquet", [parquet(a=[1, 2], b=[0.5, 0.25], target=[30, -4])])
    source, got = opened(f"{storage}/b.parquet")
    assert got["x"].tolist() == [[1, 0.5], [2, 0.25]]
    assert (got["y"].tolist(), source.classes) == ([1, 0], ("-4", "30"))


def test_categories_are_classes_where_they_occur(tmp_path: Path) -> None:
    grades = pa.DictionaryArray.from_arrays(pa.array([2, 0, 2]), pa.array(["low", "unused", "high"]))
    (tmp_path / "a.parquet").write_bytes(parquet(a=[1, 2, 3], label=grades))
    source, got = opened(str(tmp_path / "a.parquet"))
    assert (got["y"].tolist(), source.classes) == ([0, 1, 0], ("high", "low"))


def test_the_files_of_a_folder_follow_each_other(storage: Storage) -> None:
    storage.write("part-0.parquet", [parquet(a=[1, 2], y=[0.5, 1.5])])
    storage.write("part-1.parquet", [parquet(y=[2.5], a=[3.5])])
    storage.write("_SUCCESS", [b""])
    _, got = opened(str(storage))
    assert got["x"].tolist() == [[1], [2], [3.5]]
    assert (got["y"].dtype, got["y"].tolist()) == (torch.float32, [0.5, 1.5, 2.5])


@pytest.mark.parametrize(
    ("options", "x", "y", "classes"),
    [
        ({"x": ["sepal"], "y": "petal"}, [[2], [3], [4], [5]], [1.5, 0.25, -7, 1000], ()),
        ({"x": "sepal", "y": "wild"}, [2, 3, 4, 5], [1, 0, 1, 0], ("false", "true")),
        ({"x": ["wild"], "y": "sepal", "target": "values"}, [[1], [0], [1], [0]], [2, 3, 4, 5], ()),
        ({"x": ["wild"], "y": ["sepal", "petal"]}, [[1], [0], [1], [0]], [[2, 1.5], [3, 0.25], [4, -7], [5, 1000]], ()),
        ({"x": ["wild"], "classes": ["tulip", "rose", "daisy"]}, [[1], [0], [1], [0]], [1, 2, 1, 0], None),
        ({"x": ["wild"], "y": []}, [[1], [0], [1], [0]], None, ()),
    ],
)
def test_options(options: dict[str, Any], x: list[Any], y: list[Any] | None, classes: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(FLOWERS)
    source, got = opened(str(tmp_path / "a.csv"), **options)
    assert got["x"].tolist() == x
    assert (got["y"].tolist() if "y" in got else None) == y
    assert source.classes == (classes if classes is not None else ("tulip", "rose", "daisy"))
    if "y" in got:
        assert got["y"].dtype == (torch.int64 if source.classes else torch.float32)


def test_csv_without_header_and_with_another_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1;2;a\n3;4;b\n")
    _, got = opened(str(tmp_path / "a.csv"), delimiter=";", header=False, y="f2")
    assert (got["x"].tolist(), got["y"].tolist()) == ([[1, 2], [3, 4]], [0, 1])


@pytest.mark.parametrize(
    ("text", "options", "where", "says"),
    [
        (FLOWERS, {"y": "lable"}, "y", "no column 'lable' (did you mean 'label'?)"),
        (FLOWERS, {"x": ["petals", "sepal"]}, "x", "no column 'petals' (did you mean 'petal'?)"),
        (FLOWERS, {"group": "field"}, "group", "no column 'field'"),
        (FLOWERS, {"x": ["label"], "y": "wild"}, "x", "column 'label' holds string, not numbers, as 'rose'"),
        (FLOWERS, {"y": "label", "target": "values"}, "y", "column 'label' holds string, not numbers"),
        (FLOWERS, {"classes": ["rose", "daisy"]}, "classes", "'tulip' in row 4 of"),
        (FLOWERS, {"colour": 1}, "colour", "unknown key 'colour'"),
        (FLOWERS, {"delimiter": ", "}, "delimiter", "at most 1"),
        ("a,b\n1,2\n", {}, "y", "which column is to be predicted is not said (one of a, b; [] for none)"),
        ("y,label\n1,2\n", {}, "y", "which column is to be predicted is not clear (one of y, label; [] for none)"),
        ("y\n1\n", {}, "x", "no column of features"),
        ("a,y\n1,2\n,3\n", {}, None, "the value of column 'a' is missing in row 2 of"),
        ("a,y\n1,2\nnan,3\n", {}, None, "the value of column 'a' is missing in row 2 of"),
        ("a,y\n1,cat\n2,\n", {}, None, "the value of column 'y' is missing in row 2 of"),
        ("a,y\n1,1.5\n2,\n", {}, None, "the value of column 'y' is missing in row 2 of"),
        ("a,a,y\n1,1,1\n", {}, None, "several columns named 'a'"),
        ("a,y\n1,2\n1,2,3\n", {}, None, "cannot be read as csv"),
        ("a,y\n", {}, None, "no samples"),
        ("", {}, None, "cannot be read as csv"),
    ],
)
def test_tables_that_are_refused(
    text: str, options: dict[str, Any], where: str | None, says: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(text)
    found = refusal(str(tmp_path / "a.csv"), **options)
    assert says in found[1]
    assert found[0] == (f"data.options.{where}" if where else "data.source")


def test_parquet_that_is_refused(tmp_path: Path) -> None:
    good = parquet(a=[1.0, 2.0], y=[0, 1])
    (tmp_path / "0.parquet").write_bytes(good)
    (tmp_path / "1.parquet").write_bytes(parquet(a=[1.0, None], y=[0, 1]))
    assert f"'a' is missing in row 2 of '{tmp_path / '1.parquet'}'" in refusal(str(tmp_path))[1]
    (tmp_path / "1.parquet").write_bytes(parquet(b=[1.0], y=[0]))
    assert "differ in their columns: a, b" in refusal(str(tmp_path))[1]
    (tmp_path / "1.parquet").write_bytes(parquet(a=["1"], y=[0]))
    assert "differ in the type of a column" in refusal(str(tmp_path))[1]
    for labels, says in (([b"\xff"], "holds binary"), ([[1, 2]], "holds list"), ([float("nan")], "missing in row 1")):
        (tmp_path / "2.parquet").write_bytes(parquet(a=[1.0], y=labels))
        assert says in refusal(str(tmp_path / "2.parquet"), target="classes")[1]
    (tmp_path / "2.parquet").unlink()
    (tmp_path / "1.parquet").write_bytes(good[:-5])
    assert "cannot be read as parquet" in refusal(str(tmp_path))[1]
    assert refusal(str(tmp_path), delimiter=";")[0] == "data.options.delimiter"


# --- the split


def rows_to_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["a", "b", "patient", "y"])
        writer.writeheader()
        writer.writerows(rows)


def people(n: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {"a": draw.gauss(0, 1), "b": i, "patient": f"p{draw.randrange(60)}", "y": ("no", "yes")[i % 2]}
        for i in range(n)
    ]


def test_rows_that_are_added_anywhere_move_no_other(tmp_path: Path) -> None:
    rows, more = people(400, 0), people(300, 1)
    rows_to_csv(tmp_path / "a.csv", rows)
    rows_to_csv(tmp_path / "b.csv", random.Random(2).sample([*rows, *more], 700))
    before, after = (parts_of(str(tmp_path / name), x=["a", "b"]) for name in ("a.csv", "b.csv"))
    assert {name: round(len(part) / 400, 1) for name, part in before.items()} == {"train": 0.5, "val": 0.2, "test": 0.3}
    for name, part in before.items():
        assert not [row for row in part if row not in after[name]]


def test_a_group_stays_together(tmp_path: Path) -> None:
    rows = people(500, 3)
    rows_to_csv(tmp_path / "a.csv", rows)
    patients: dict[str, set[str]] = defaultdict(set)
    for name, part in parts_of(str(tmp_path / "a.csv"), group="patient").items():
        for row in part:
            patients[rows[int(row["x"][1])]["patient"]].add(name)
    assert len(patients) == 60
    assert {len(parts) for parts in patients.values()} == {1}
    assert set.union(*patients.values()) == {"train", "val", "test"}


def test_the_split_of_rows_never_changes_between_releases(tmp_path: Path) -> None:
    rows_to_csv(tmp_path / "a.csv", people(40, 0))
    parts = parts_of(str(tmp_path / "a.csv"), x=["a", "b"])
    assert [int(row["x"][1]) for row in parts["val"]] == [1, 3, 16, 21, 25, 34, 35]
