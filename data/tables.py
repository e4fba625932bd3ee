"""Tables: CSV and Parquet to features and targets, in memory. Read by pyarrow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..core.errors import JobError, Problem, did_you_mean
from ..core.formats import Format
from ..core.job import DataSpec
from ..core.spec import Spec
from .arrays import ArraySource
from .files import OPTIONS, Files, read_options, wrong
from .order import hash64

_SHOWN = 40
_TARGETS = ("y", "label", "target")


class TableOptions(Spec):
    x: list[str] | str | None = None
    """Columns of the features: a list gives [n, columns], one name [n]. The default is all but y and group."""
    y: list[str] | str | None = None
    """What to predict: one column, or a list of numbers; [] for nothing. The default is the column named 'y', 'label'
    or 'target'."""
    target: Literal["auto", "classes", "values"] = "auto"
    """Whether y counts classes (int64) or measures (float32); 'auto' takes fractions for measures, all else for
    classes."""
    classes: list[str] | None = Field(default=None, min_length=1)
    """The classes in their order; the default is all that occur, sorted."""
    group: str | None = None
    """Rows with the same value in this column fall into the same part of the split (a patient, a user)."""


class CsvOptions(TableOptions):
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """What stands between two columns."""
    header: bool = True
    """Whether the first line names the columns; else they are f0, f1, …"""


class TsvOptions(CsvOptions):
    delimiter: str = Field(default="\t", min_length=1, max_length=1)
    """What stands between two columns."""


_OPTIONS: dict[Format, type[TableOptions]] = {"csv": CsvOptions, "tsv": TsvOptions, "parquet": TableOptions}


def read_csv(files: Files, spec: DataSpec) -> ArraySource:
    """A CSV file, or all in a folder one after the other, plain or gzip: 'x' float32, 'y' int64 classes or float32.

    Raises:
        JobError: see :func:`_source`.
    """
    options = read_options(CsvOptions, spec.options)
    return _source(_read(files, "csv", options), options)


def read_tsv(files: Files, spec: DataSpec) -> ArraySource:
    """As :func:`read_csv`, with tabs between the columns."""
    options = read_options(TsvOptions, spec.options)
    return _source(_read(files, "tsv", options), options)


def read_parquet(files: Files, spec: DataSpec) -> ArraySource:
    """As :func:`read_csv`, of Parquet."""
    options = read_options(TableOptions, spec.options)
    return _source(_read(files, "parquet", options), options)


@dataclass(frozen=True)
class _Table:
    """A pyarrow table, and which rows come from which file."""

    columns: Any
    files: tuple[tuple[str, int], ...]

    def names(self) -> list[str]:
        return list(self.columns.column_names)

    def place(self, row: int) -> str:
        """The row as messages name it, counted from 1 in its own file."""
        for name, rows in self.files:
            if row < rows:
                return f"row {row + 1} of '{name}'"
            row -= rows
        raise IndexError(row)


def _read(files: Files, format: Format, options: TableOptions) -> _Table:
    import pyarrow as pa

    parts: list[tuple[str, Any]] = []
    for name in files.of(format):
        with files.reading(name, format), files.open(name) as file:
            parts.append((files.shown(name), _parse(file, options)))
    columns = parts[0][1].column_names
    for name, table in parts:
        if twice := sorted({c for c in table.column_names if table.column_names.count(c) > 1}):
            raise wrong(f"'{name}' has several columns named '{twice[0]}'")
        if sorted(table.column_names) != sorted(columns):
            differ = sorted(set(columns) ^ set(table.column_names))
            raise wrong(f"'{parts[0][0]}' and '{name}' differ in their columns: {', '.join(differ)}")
    try:
        joined = pa.concat_tables([table.select(columns) for _, table in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise wrong(f"the files in '{files.url}' differ in the type of a column: {error}") from error
    if not joined.num_rows:
        raise wrong("it has no samples")
    for i, field in enumerate(joined.schema):
        if pa.types.is_dictionary(field.type):  # categories that do not occur are no classes
            joined = joined.set_column(i, field.name, joined.column(i).cast(field.type.value_type))
    return _Table(joined, tuple((name, table.num_rows) for name, table in parts))


def _parse(file: Any, options: TableOptions) -> Any:
    """The whole file in one thread: ranks share the cores, and data workers are forked from them."""
    import pyarrow.csv
    import pyarrow.parquet

    if not isinstance(options, CsvOptions):
        return pyarrow.parquet.read_table(file, use_threads=False)
    return pyarrow.csv.read_csv(
        file,
        read_options=pyarrow.csv.ReadOptions(use_threads=False, autogenerate_column_names=not options.header),
        parse_options=pyarrow.csv.ParseOptions(delimiter=options.delimiter),
    )


def _source(table: _Table, options: TableOptions) -> ArraySource:
    """The samples of a table.

    Raises:
        JobError: a column that is not there, features that are no numbers, a value that is missing, a class that is
            not in the list; with column and row.
    """
    y = _target(table, options)
    targets = [y] if isinstance(y, str) else y
    x = options.x
    if x is None:
        x = [name for name in table.names() if name not in targets and name != options.group]
    named = [x] if isinstance(x, str) else x
    _check_names(table, {"x": named, "y": targets, "group": [options.group] if options.group else []})
    numbers = {name: _numbers(table, name, f"{OPTIONS}.x") for name in named}
    arrays, classes, labels = {"x": _stack(numbers, x)}, (), {}
    if isinstance(y, str) and _counts_classes(table, y, options):
        arrays["y"], classes = _encode(table, y, options.classes)
        labels = {y: _hashes(table, y)}
    elif targets:
        values = {name: _numbers(table, name, f"{OPTIONS}.y") for name in targets}
        arrays["y"] = _stack(values, y)
        labels = {name: value.view(np.uint64) for name, value in values.items()}
    if options.group:
        keys = _hashes(table, options.group)
    else:
        keys = _combine([*(value.view(np.uint64) for value in numbers.values()), *labels.values()])
    return ArraySource(arrays, keys=keys, classes=classes)


def _target(table: _Table, options: TableOptions) -> list[str] | str:
    if options.y is not None:
        return options.y
    found = [name for name in _TARGETS if name in table.names()]
    if len(found) != 1:
        what = (
            "which column is to be predicted is not clear" if found else "which column is to be predicted is not said"
        )
        hint = f"one of {', '.join(found or table.names()[:30])}; [] for none"
        raise wrong(what, hint, f"{OPTIONS}.y")
    return found[0]


def _check_names(table: _Table, wanted: dict[str, list[str]]) -> None:
    problems = [
        Problem(f"there is no column '{name}'", f"{OPTIONS}.{key}", did_you_mean(name, table.names()))
        for key, names in wanted.items()
        for name in names
        if name not in table.names()
    ]
    if not wanted["x"]:
        problems.append(Problem("there is no column of features", f"{OPTIONS}.x"))
    if problems:
        raise JobError(*problems)


def _stack(columns: dict[str, np.ndarray], names: list[str] | str) -> np.ndarray:
    """float32 ``[n]`` of one name, ``[n, columns]`` of a list."""
    if isinstance(names, str):
        return columns[names].astype(np.float32)
    stacked = np.empty((len(next(iter(columns.values()))), len(names)), dtype=np.float32)
    for i, name in enumerate(names):
        stacked[:, i] = columns[name]
    return stacked


def _numbers(table: _Table, name: str, where: str) -> np.ndarray:
    """A column as float64 ``[n]``: numbers, and false and true as 0 and 1."""
    import pyarrow as pa

    column, kind = table.columns[name], table.columns[name].type
    _refuse_missing(table, name)
    if not any(is_kind(kind) for is_kind in (*_fractions(), pa.types.is_integer, pa.types.is_boolean)):
        what = f"column '{name}' holds {kind}, not numbers, as {repr(table.columns[name][0].as_py())[:_SHOWN]}"
        raise wrong(what, f"leave it out: {where} lists the columns to take", where)
    return _plain(column).astype(np.float64) + 0.0  # -0.0 is 0.0: equal samples have equal keys


def _plain(column: Any) -> np.ndarray:
    return column.combine_chunks().to_numpy(zero_copy_only=False)


def _fractions() -> tuple[Callable[[Any], bool], ...]:
    import pyarrow as pa

    return pa.types.is_floating, pa.types.is_decimal


def _refuse_missing(table: _Table, name: str) -> None:
    import pyarrow.compute

    row = pyarrow.compute.index(table.columns[name].is_null(nan_is_null=True), True).as_py()
    if row >= 0:
        raise _missing(table, name, row)


def _missing(table: _Table, name: str, row: int) -> JobError:
    hint = "fill it in, leave the row out, or leave the column out"
    return wrong(f"the value of column '{name}' is missing in {table.place(row)}", hint)


def _counts_classes(table: _Table, name: str, options: TableOptions) -> bool:
    if options.target == "auto":
        return options.classes is not None or not any(is_kind(table.columns[name].type) for is_kind in _fractions())
    return options.target == "classes"


def _distinct(table: _Table, name: str) -> tuple[list[Any], np.ndarray]:
    """The distinct values of a column, sorted, and of each row (int64 ``[n]``) which of them it is."""
    import pyarrow as pa

    kind = table.columns[name].type
    _refuse_missing(table, name)
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise wrong(f"column '{name}' holds {kind}, not text or numbers", "is the file UTF-8?")
    encoded = table.columns[name].combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.arange(len(values))
    return [values[i] for i in order], ranks[encoded.indices.to_numpy(zero_copy_only=False)]


def _encode(table: _Table, name: str, given: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices (int64 ``[n]``) of a column, and the names of the classes."""
    values, codes = _distinct(table, name)
    names = [_text(value) for value in values]
    if "" in names:
        raise _missing(table, name, int(np.flatnonzero(codes == names.index(""))[0]))
    if given is None:
        return codes, tuple(names)
    places = {text: i for i, text in enumerate(given)}
    for code, text in enumerate(names):
        if text not in places:
            row = table.place(int(np.flatnonzero(codes == code)[0]))
            raise wrong(f"'{text}' in {row} is none of the classes", did_you_mean(text, given), f"{OPTIONS}.classes")
    return np.array([places[text] for text in names], dtype=np.int64)[codes], tuple(given)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hashes(table: _Table, name: str) -> np.ndarray:
    """A hash of each row's value in a column, uint64 ``[n]``."""
    values, codes = _distinct(table, name)
    digests = [hashlib.blake2b(_text(value).encode(), digest_size=8).digest() for value in values]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)[codes]


def _combine(columns: Sequence[np.ndarray]) -> np.ndarray:
    """One key of several: uint64 ``[n]`` each, in their order."""
    keys = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        keys = hash64(keys, column)
    return keys
