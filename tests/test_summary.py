"""The summary of a finished run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dltrain.cli.summary import print_summary
from dltrain.core.job import Job
from dltrain.launcher.carry import RunResult
from dltrain.tracking.outcome import Outcome


def result(**changes: Any) -> RunResult:
    done = RunResult("finished", Path("/[red]/runs/a/0001"), 7, {}, 0.5, {"steps": 1.0}, Outcome("disabled"))
    return replace(done, **changes)


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"val/[/x]": 1.0, "val/[bold]y": 2.0, "val/:cat:": 3.0}
    print_summary(Job(name="a"), result(metrics=metrics))
    said = capsys.readouterr().out
    assert all(name in said for name in metrics)
    assert "/[red]/runs/a/0001" in said


def test_what_checkpoints_have_cost_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    costs = [{"stall_seconds": 0.25 * n, "durable_seconds": 4.0 - n, "bytes": 2_000_000} for n in (1, 2)]
    print_summary(Job(name="a"), result(checkpoints=costs))
    assert "2 of 2.0 MB: training waited 0.75 s, durable within 3.0 s" in capsys.readouterr().out


@pytest.mark.parametrize("to", [None, "s3://bucket/run"])
def test_the_same_job_again_is_a_command_that_works(to: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of its own, where the checkpoints of this one would be in its way."""
    print_summary(Job.model_validate({"checkpoint": {"to": to}}), result(run_dir=Path("/r")))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--resume never" in line]
    words = shlex.split(line, comments=True)
    assert words[:5] == ["dltrain", "launch", "/r/job.yaml", "--resume", "never"]
    assert words[5:] == (["checkpoint.to=null"] if to else [])
