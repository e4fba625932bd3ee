"""The data formats by how a file's name ends, and which of them need a package beyond the required ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

from .errors import Problem
from .suggest import nearest, similar_files

Format = Literal[
    "auto", "csv", "idx", "images", "jsonl", "npy", "npz", "parquet", "safetensors", "text", "tokens", "tsv"
]

_PLAIN: Mapping[str, Format] = {
    ".npz": "npz",
    ".npy": "npy",
    ".safetensors": "safetensors",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".tokens": "tokens",
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"), "images"),
}
_ALSO_GZIPPED: Mapping[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    **{f"{mark}idx{axes}-ubyte": "idx" for mark in "-." for axes in (1, 2, 3, 4)},
}
ENDINGS: Mapping[str, Format] = {
    **_PLAIN,
    **{ending + gz: format for ending, format in _ALSO_GZIPPED.items() for gz in ("", ".gz")},
}
"""Format by the ending of a file's name, in small letters."""

_PACKAGES: Mapping[Format, tuple[str, str]] = {
    "csv": ("pyarrow", "tables"),
    "tsv": ("pyarrow", "tables"),
    "parquet": ("pyarrow", "tables"),
    "images": ("PIL", "images"),
}
KNOWN = ".csv, .tsv, .parquet, .npz, .npy, .safetensors, .jsonl, .txt, .tokens, idx3-ubyte, or a folder of images"
"""The formats as a hint names them."""


def format_of(name: str) -> Format | None:
    """The format of a file called ``name``, or of a path or URL that ends in it; None where its ending tells none."""
    name = name.lower()
    return next((format for ending, format in ENDINGS.items() if name.endswith(ending)), None)


def is_url(text: str) -> bool:
    """Whether ``text`` is an fsspec URL rather than a local path."""
    return "://" in text


def is_object(source: str) -> bool:
    """Whether ``source`` names a Python object (``module:function``) rather than a file: a path may hold a colon."""
    return ":" in source and not is_url(source) and format_of(source) is None and not Path(source).exists()


def missing_package(format: Format) -> Iterator[Problem]:
    """The problem (without a place) that a package which ``format`` needs is not installed."""
    package, extra = _PACKAGES.get(format, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        yield Problem(f"reading {format} needs the package {package}", hint=f"pip install 'dltrain[{extra}]'")


def no_such_source(source: str, built_in: Collection[str], where: str) -> Problem:
    """The problem that ``source`` is neither built in nor there, with what was probably meant."""
    if format_of(source) is not None or "/" in source or Path(source).suffix:
        return no_such_file(source, where)
    near = nearest(source, built_in)
    hint = f"did you mean '{near}'?" if near else f"known: {', '.join(built_in)}; files ({KNOWN}); 'module:function'"
    return Problem(f"no data source '{source}'", where, hint)


def no_such_file(path: str, where: str) -> Problem:
    """The problem that nothing lies at the local ``path``, with what was probably meant."""
    endings = {Path(f"x{ending}").suffix for ending in ENDINGS} - {""}
    return Problem(f"no such file: '{path}'", where, similar_files(Path(path).expanduser(), sorted(endings)))
