"""No command imports anything heavy before it needs it, and help is there at once."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

DLTRAIN = str(Path(sys.executable).with_name("dltrain"))
HEAVY = {
    "torch",
    "ray",
    "wandb",
    "numpy",
    "pandas",
    "sklearn",
    "s3fs",
    "botocore",
    "aiohttp",
    "tensorboard",
    "pyarrow",
    "PIL",
}
SCHEMA = {"dltrain.core.job", "ruamel", "fsspec"}


def imported(*args: str) -> set[str]:
    """Modules and their top-level packages that ``dltrain ARGS`` imports, as the interpreter itself counts them."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("DLTRAIN_")}
    command = [sys.executable, "-X", "importtime", DLTRAIN, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
    rows = [line for line in done.stderr.splitlines() if line.startswith("import time:") and "[us]" not in line]
    assert rows, done.stderr
    names = {line.rpartition("|")[2].strip() for line in rows}
    return names | {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "--version",
        "launch --help",
        "config --help",
        "data --help",
        "checkpoint --help",
        "checkpoint ls --help",
        "data prepare --help",
        "status --help",
        "logs --help",
        "stop --help",
        "nonsense",
        "launch --nonsense",
    ],
)
def test_what_needs_no_job_reads_no_schema(line: str) -> None:
    assert not imported(*line.split()) & (HEAVY | SCHEMA)


def test_the_help_of_dltrain_is_leanest() -> None:
    assert not imported("--help") & {"pydantic", "pydantic_core"}  # Typer loads them for the options of a command


@pytest.mark.parametrize(
    "line",
    [
        "config show",
        "config show seed=1 recipe=mine:Mine checkpoint.to=s3://bucket/run",
        "config show --json",
        "config schema",
        "config init",
        "config import default_config.yaml",
        "status",
        "launch nothing.yaml",
        "launch train.epoch=3",
        "launch recipe=nowhere:Mine",
        "launch --nodes 0 train.py",
    ],
)
def test_what_reads_a_job_imports_nothing_heavy(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("import torch\nclass Mine: ...\n", encoding="utf-8")
    Path("default_config.yaml").write_text("num_processes: 8\n", encoding="utf-8")
    assert not imported(*line.split()) & HEAVY


def test_the_package_itself_imports_nothing() -> None:
    program = "import sys; before = set(sys.modules); import dltrain; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & (HEAVY | SCHEMA)


YARDSTICK = "import asyncio, unittest.mock, http.client, logging.config, xml.dom.minidom"


def test_help_takes_less_than_three_tenths_of_a_second() -> None:
    """In processor time, which is the wall time of a machine that does nothing else.

    On a machine that takes longer than a tenth of a second for the yardstick, no more than three times as long.
    """

    def took(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    both = [(took(DLTRAIN, "--help"), took(sys.executable, "-c", YARDSTICK)) for _ in range(10)]
    help_, yardstick = (min(times) for times in zip(*both, strict=True))
    assert help_ <= max(0.3, 3 * yardstick)
