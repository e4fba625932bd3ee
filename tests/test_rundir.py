"""The run directory: numbers, the lock, and which run a launch continues."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from dltrain.core.errors import JobError, RunFailed
from dltrain.core.job import Job, TrackingSpec, WandbSpec
from dltrain.launcher.metrics import Metrics
from dltrain.launcher.rundir import RunDir, differences, newest_run

JOB = Job(name="mine").model_dump(mode="json")


def test_runs_are_numbered_and_latest_points_to_the_newest(tmp_path: Path) -> None:
    for number in ("0001", "0002"):
        run = RunDir.create(tmp_path, "mine", JOB)
        assert run.number == number
        assert (tmp_path / "mine" / "latest").resolve() == run.path
        run.close()


def test_a_run_is_opened_again_with_its_record_by_one_at_a_time(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "mine", JOB, origin="s3://elsewhere")
    run.update(state="stopped", generations=2, step=7, command=("dltrain", "launch"))
    assert RunDir.reopen(run.path) is None
    run.close()
    again = RunDir.reopen(run.path)
    assert again is not None
    assert again.record == run.record
    again.close()


def test_the_newest_run_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    assert newest_run(tmp_path, "mine") is None
    for number in ("0009", "0010", "2", "notes"):
        (tmp_path / "mine" / number).mkdir(parents=True)
    assert newest_run(tmp_path, "mine") == tmp_path / "mine" / "0010"


def test_a_broken_record_is_no_run(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "mine", JOB)
    run.close()
    (run.path / "run.json").write_text("{", encoding="utf-8")
    assert RunDir.reopen(run.path) is None


def test_a_discarded_run_leaves_no_trace(tmp_path: Path) -> None:
    first = RunDir.create(tmp_path, "mine", JOB)
    first.close()
    RunDir.create(tmp_path, "mine", JOB).discard()
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"0001", "latest"}
    assert (tmp_path / "mine" / "latest").resolve() == first.path
    RunDir.create(tmp_path, "other", JOB).discard()
    assert not (tmp_path / "other").exists()


def test_a_summary_that_cannot_be_written_keeps_no_tracker_from_its_end(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "mine", JOB)
    (run.path / "summary.json.partial").mkdir()
    tracking = TrackingSpec(wandb=WandbSpec(mode="disabled"))
    metrics = Metrics(run, tracking, config={}, on_message=print)
    metrics.summarize({"goodput": 1.0})
    assert metrics.finish(5.0, failed=False, give_up=lambda: False).state == "disabled"
    run.close()


def test_a_disk_that_takes_nothing_is_told_of_and_nothing_is_half_written(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "mine", JOB)
    before = sorted(tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # what is written fails, as on a full disk
    try:
        with pytest.raises(RunFailed, match=r"run\.json cannot be written: File too large"):
            run.update(state="finished")
        with pytest.raises(JobError, match=r"--run-dir: .*run\.json cannot be written"):
            RunDir.create(tmp_path, "mine", JOB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.rglob("*")) == before
    run.close()
    again = RunDir.reopen(run.path)
    assert again is not None
    again.close()


def test_only_what_changes_the_numbers_makes_another_job() -> None:
    changed = Job.model_validate({"name": "mine", "seed": 1, "resources": {"nodes": 4}, "data": {"workers": 2}})
    assert differences(changed, JOB) == ["seed"]
    spread = Job.model_validate({"name": "mine", "parallel": {"strategy": "fsdp", "tensor": 2, "replicas": 2}})
    assert differences(spread, JOB) == []
    lossy = Job.model_validate({"name": "mine", "parallel": {"compress": "bf16"}})
    assert differences(lossy, JOB) == ["parallel.compress"]
