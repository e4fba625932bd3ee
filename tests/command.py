"""The ``dltrain`` command within this process: its exit code and what it prints, without an interpreter's start."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest.mock import patch

from dltrain.cli.main import main


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


def dltrain(*args: str) -> Done:
    """Run ``dltrain ARGS``."""
    kept = io.BytesIO()
    out, err = io.TextIOWrapper(kept, encoding="utf-8", write_through=True), io.StringIO()
    code = 0
    with (
        patch.object(sys, "argv", ["dltrain", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, kept.getvalue().decode(), err.getvalue())
