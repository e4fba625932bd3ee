"""``dltrain data``: what a job's data look like, and a corpus tokenized into one file."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import TextIO

import numpy as np

from ..core.config import load_job
from ..core.errors import JobError
from ..data.prepare import Progress, prepare
from ..models.registry import RECIPES
from .arguments import job_target

_SHOWN = 20
_EVERY = 0.5  # seconds between two lines of progress


def show_data(target: Sequence[str]) -> None:
    """Print how many samples a job's data have, in which parts, of which shapes and classes.

    Raises:
        JobError: with every problem of the job, or of its data.
    """
    named = job_target(target)
    if named.problems:
        raise JobError(*named.problems)
    spec = load_job(named.job_file, named.overrides, {}, os.environ, recipes=RECIPES).job.data
    from ..data.sources import open_source  # it takes torch
    from ..data.split import split_source

    source = open_source(spec)
    parts = split_source(source, spec.split)
    rows = [("source", spec.source), ("samples", f"{len(source):,}")]
    rows += [(name, f"{len(indices):,}") for name, indices in parts.items()]
    first = source.fetch(np.zeros(1, dtype=np.int64))
    for key, value in first.items():
        rows.append((key, f"{str(value.dtype).removeprefix('torch.')} {list(value.shape[1:])}"))
    vocabulary = getattr(source, "vocabulary_size", None)
    if vocabulary is not None:
        rows.append(("vocabulary", f"{vocabulary:,}"))
    classes: Sequence[str] = getattr(source, "classes", ())
    if classes:
        shown = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:_SHOWN]))
        rows.append(("classes", f"{len(classes):,}: {shown}{', …' if len(classes) > _SHOWN else ''}"))
    width = max(len(name) for name, _ in rows)
    sys.stdout.write("".join(f"{name:<{width}}  {text}\n" for name, text in rows))


def prepare_data(
    inputs: Sequence[str],
    out: str,
    *,
    tokenizer: str,
    vocabulary: int | None,
    field: str,
    pattern: str | None,
    end_token: str | None,
    force: bool,
) -> None:
    """Tokenize ``inputs`` into the file ``out``, with progress where a person watches.

    Raises:
        JobError: what :func:`~.data.prepare.prepare` raises.
    """
    with _Ticker(sys.stderr) as ticker:
        done = prepare(
            inputs,
            out,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            field=field,
            pattern=pattern,
            end_token=end_token,
            force=force,
            progress=ticker.tell,
        )
    size = f"{done.documents:,} documents, {done.tokens:,} tokens as {done.dtype}, vocabulary {done.vocabulary_size:,}"
    trained = f"wrote {done.tokenizer}\n" if done.tokenizer else ""
    use = shlex.quote(f"data.source={done.path}")
    sys.stdout.write(
        f"{trained}wrote {done.path}: {size}\n\nnext:\n  dltrain data show {use} data.options.length=128\n"
    )


class _Ticker:
    """One line on a terminal that tells how far it is; nothing elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._on = stream.isatty()
        self._next = 0.0
        self._width = 0

    def __enter__(self) -> _Ticker:
        return self

    def tell(self, at: Progress) -> None:
        now = time.monotonic()
        if self._on and now >= self._next:
            self._next = now + _EVERY
            self._write(f"file {at.file:,} of {at.files:,}, {at.tokens:,} tokens")

    def __exit__(self, *_: object) -> None:
        if self._width:
            self._write("")
            self._stream.write("\r")

    def _write(self, text: str) -> None:
        self._stream.write(f"\r{text:<{self._width}}")
        self._stream.flush()
        self._width = len(text)
