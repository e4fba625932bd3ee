"""The built-in data sets: real data that comes with Python and scikit-learn. Nothing is downloaded.

scikit-learn's files are read from inside its package, because importing ``sklearn.datasets`` takes a second per rank.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from ..core.contracts import Source
from ..core.errors import JobError, Problem
from ..core.job import DataSpec, Split
from ..core.schema import explain
from ..core.spec import Spec
from .stdlib_text import StdlibOptions, stdlib_text

Arrays = Mapping[str, np.ndarray]


class NoOptions(Spec):
    """The data set takes no options."""


class ScanOptions(Spec):
    """Options of 'digits_scan' (``data.options:``)."""

    history: int = Field(56, gt=0)
    """Values to predict from."""
    horizon: int = Field(8, gt=0)
    """Values to predict."""


@dataclass(frozen=True)
class BuiltIn:
    """A data set by name.

    Attributes:
        what: what a sample is, in a sentence.
        options: the options that it takes, as a pydantic model.
        open: the samples, one array per key or a source, from checked options and the job's split.
    """

    what: str
    options: type[Spec]
    open: Callable[[Any, Split], Arrays | Source]


def open_builtin(spec: DataSpec) -> Arrays | Source:
    """The samples of the built-in data set ``spec.source``.

    Raises:
        JobError: an option is wrong, or the installed files cannot be read.
    """
    found = BUILT_IN[spec.source]
    if spec.options and not found.options.model_fields:
        raise JobError(Problem(f"'{spec.source}' takes no options, not '{next(iter(spec.options))}'", "data.options"))
    try:
        options = found.options.model_validate(spec.options)
    except ValidationError as error:
        raise JobError(
            *(
                replace(problem, where=".".join(("data.options", *path)))
                for path, problem in explain(error, found.options, spec.options)
            )
        ) from None
    return found.open(options, spec.split)


def _digits(options: NoOptions, split: Split) -> Arrays:
    """x float32 [1797, 1, 8, 8] in 0..16, y int64."""
    table = _shipped("digits.csv.gz")
    return {"x": table[:, :64].reshape(-1, 1, 8, 8), "y": table[:, 64].astype(np.int64)}


def _digits_scan(options: ScanOptions, split: Split) -> Arrays:
    """x float32 [n, history, 1] and y float32 [n, horizon], both in 0..16, from windows that do not overlap."""
    series = _shipped("digits.csv.gz")[:, :64].ravel()
    length = options.history + options.horizon
    if length > len(series):
        problem = f"history and horizon make {length} values, the series has {len(series)}"
        raise JobError(Problem(problem, "data.options"))
    windows = series[: len(series) // length * length].reshape(-1, length)
    return {"x": windows[:, : options.history, None], "y": windows[:, options.history :]}


def _table(file: str) -> Callable[[NoOptions, Split], Arrays]:
    """Opens a file of scikit-learn whose first line is a heading, and whose last column is a class index."""

    def read(options: NoOptions, split: Split) -> Arrays:
        table = _shipped(file, heading=True)
        return {"x": table[:, :-1], "y": table[:, -1].astype(np.int64)}

    return read


def _diabetes(options: NoOptions, split: Split) -> Arrays:
    """x float32 [442, 10] as measured, y float32: the progression of the disease a year later, 25 to 346."""
    return {"x": _shipped("diabetes_data_raw.csv.gz", delimiter=None), "y": _shipped("diabetes_target.csv.gz")}


def _shipped(name: str, *, delimiter: str | None = ",", heading: bool = False) -> np.ndarray:
    """A table of numbers inside scikit-learn's package, float32."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise _wrong("this data set needs scikit-learn, which is not installed", "pip install scikit-learn")
    file = Path(found.origin).parent / "datasets" / "data" / name
    try:
        return np.loadtxt(file, delimiter=delimiter, dtype=np.float32, skiprows=int(heading))
    except (OSError, ValueError) as error:
        raise _wrong(f"scikit-learn's {name} cannot be read: {error}", "reinstall scikit-learn") from error


def _wrong(what: str, hint: str) -> JobError:
    return JobError(Problem(what, "data.source", hint))


#: A new data set is one function and one line here, and its name in core/checks.py.
BUILT_IN: Mapping[str, BuiltIn] = {
    "digits": BuiltIn("scikit-learn's 1,797 handwritten digits: 8 × 8 pixels, 10 classes", NoOptions, _digits),
    "digits_scan": BuiltIn(
        "a real-valued series: the brightness along a scan of scikit-learn's digits, line by line, 115,008 values with "
        "a season of 8 (a line); 'x' is a window of it and 'y' the values that follow",
        ScanOptions,
        _digits_scan,
    ),
    "iris": BuiltIn("150 flowers: 4 features, 3 classes", NoOptions, _table("iris.csv")),
    "wine": BuiltIn("178 wines: 13 features, 3 classes", NoOptions, _table("wine_data.csv")),
    "breast_cancer": BuiltIn("569 tumours: 30 features, 0 malignant, 1 benign", NoOptions, _table("breast_cancer.csv")),
    "diabetes": BuiltIn(
        "442 patients: 10 features, 'y' the progression of the disease after a year (25 to 346)", NoOptions, _diabetes
    ),
    "stdlib_text": BuiltIn(
        "the source text of Python's standard library as tokens: 'y' is 'x' one token on", StdlibOptions, stdlib_text
    ),
}
