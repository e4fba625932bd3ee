"""Going on: which run and which checkpoint a launch continues, and that it computes what it would have."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from checkpoints import flip, held_by_one, shard_files
from dltrain.checkpoint.writer import commit, make_manifest
from dltrain.core.errors import JobError
from dltrain.core.job import Job
from dltrain.core.storage import Storage
from dltrain.launcher.resume import Start, decide_start
from launching import Sandbox
from runs import RunFolder
from s3_server import S3Server
from stage import JOB, LAUNCH, STEPS, WAIT_AT, assert_same_run, put_recipe, run_of, stop_at

YAML = "seed: 0\n"


@pytest.fixture
def box(sandbox: Sandbox) -> Sandbox:
    put_recipe(sandbox)
    return sandbox


def job(**changes: object) -> Job:
    return Job.model_validate({"name": "mine", **changes})


def decide(job: Job, runs: Path, resume: str = "auto") -> tuple[Start, str]:
    notes: list[str] = []
    return decide_start(job, runs=runs, resume=resume, on_message=notes.append), "\n".join(notes)


def a_run(job: Job, runs: Path, *, state: str = "stopped", origin: str = "") -> Path:
    """A run directory that an earlier launch has left."""
    start = Start(origin=origin)
    run = start.open(job, runs, YAML)
    run.update(state=state)
    start.close()
    return run.path


def a_checkpoint(folder: Path, job: Job, *, step: int = 10, total: int = 20) -> None:
    records = held_by_one(Storage(str(folder)), step, {"model.m.w": torch.ones(3)})
    manifest = make_manifest(
        records, step=step, total_steps=total, samples=step, world=1, job=job.model_dump(mode="json")
    )
    commit(Storage(str(folder)), manifest)


def refusal(job: Job, runs: Path, resume: str = "auto") -> str:
    before = sorted(runs.rglob("*"))
    with pytest.raises(JobError) as caught:
        decide(job, runs, resume)
    assert sorted(runs.rglob("*")) == before
    return str(caught.value)


# ---- which run


def test_auto_continues_the_newest_run_that_is_not_finished(tmp_path: Path) -> None:
    start, notes = decide(job(), tmp_path)
    assert start.run is None
    assert not notes
    assert not list(tmp_path.iterdir())
    a_run(job(), tmp_path, state="stopped")
    for state in ("stopped", "failed", "running"):
        path = a_run(job(), tmp_path, state=state)
        start, notes = decide(job(resources={"nodes": 3}, train={"log_every": 7}), tmp_path)
        assert start.run is not None
        assert start.run.path == path
        assert f"continuing {path}" in notes
        start.close()
    a_run(job(), tmp_path, state="finished")
    assert decide(job(), tmp_path)[0].run is None


def test_another_job_begins_a_new_run_and_says_why(tmp_path: Path) -> None:
    a_run(job(), tmp_path)
    start, notes = decide(job(seed=1, train={"epochs": 3}), tmp_path)
    assert start.run is None
    assert "its job differs (seed, train.epochs): beginning a new run" in notes


def test_a_run_in_use_or_of_a_script_or_with_never_is_left_alone(tmp_path: Path) -> None:
    busy = Start()
    busy.open(job(), tmp_path, YAML)
    start, notes = decide(job(), tmp_path)
    assert start.run is None
    assert "in use by another launch" in notes
    assert "in use by another launch" in refusal(job(), tmp_path, str(tmp_path / "mine/0001"))
    busy.close()
    assert decide(job(), tmp_path, "never")[0].run is None
    start = decide(job(), tmp_path)[0]
    assert start.run is not None
    start.run.update(job={})
    start.close()
    assert decide(job(), tmp_path)[0].run is None


def test_a_named_run_is_continued_whatever_its_state_and_job(tmp_path: Path) -> None:
    path = a_run(job(), tmp_path, state="finished")
    start, notes = decide(job(seed=4), tmp_path, str(path))
    assert start.run is not None
    assert start.run.path == path
    assert "with another job than it began with: seed" in notes
    start.close()


def test_a_named_folder_of_checkpoints_begins_a_new_run_once(tmp_path: Path) -> None:
    runs, folder = tmp_path / "runs", tmp_path / "elsewhere"
    assert "there is no run and no complete checkpoint at" in refusal(job(), tmp_path, str(folder))
    a_checkpoint(folder, job(seed=9))
    a_run(job(), runs)
    start, _ = decide(job(), runs, str(folder))
    assert start.run is None
    path = start.open(job(), runs, YAML).path
    assert path.name == "0002"
    start.close()
    start, notes = decide(job(), runs, str(folder))
    assert start.run is not None
    assert start.run.path == path
    assert start.origin == str(folder)
    assert f"continuing {path}" in notes
    start.close()


def test_a_refused_launch_is_taken_back(tmp_path: Path) -> None:
    start = Start()
    start.open(job(), tmp_path, YAML)
    start.take_back()
    start.close()
    assert not list(tmp_path.iterdir())
    path = a_run(job(), tmp_path)
    files = {file: file.read_bytes() for file in path.rglob("*")}
    start, _ = decide(job(seed=2), tmp_path, str(path))
    run = start.open(job(seed=2), tmp_path, "seed: 2\n")
    run.update(state="running")
    assert {file: file.read_bytes() for file in path.rglob("*")} != files
    start.take_back()
    start.close()
    assert {file: file.read_bytes() for file in path.rglob("*")} == files


@pytest.mark.parametrize("trained", [{"step": 3, "generations": 1}, {"generations": 2}])
def test_what_has_trained_is_not_taken_back(tmp_path: Path, trained: dict[str, int]) -> None:
    start = Start()
    run = start.open(job(), tmp_path, YAML)
    run.update(**trained)
    start.take_back()
    start.close()
    assert (run.path / "run.json").exists()


def test_a_destination_that_holds_another_run_is_refused(tmp_path: Path) -> None:
    runs, folder = tmp_path / "runs", tmp_path / "checkpoints"
    mine = job(checkpoint={"to": str(folder)})
    assert decide(mine, runs)[0].run is None
    a_checkpoint(folder, job(seed=1, checkpoint={"to": str(folder)}))
    assert "holds checkpoints of another job (different: seed)" in refusal(mine, runs)
    a_checkpoint(folder, mine, step=11)
    assert decide(mine, runs)[0].run is None
    assert "holds checkpoints already" in refusal(mine, runs, "never")
    a_checkpoint(folder, mine, step=20)
    assert "holds the finished run already (step 20 of 20)" in refusal(mine, runs)
    (folder / "step-00000020/manifest.json").write_text("{", encoding="utf-8")
    assert decide(mine, runs)[0].run is None


def test_a_destination_that_cannot_be_written_is_refused_for_an_old_run_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mine = job(checkpoint={"to": str(tmp_path / "file/folder")})
    assert "checkpoint.to: cannot write to" in refusal(mine, tmp_path)
    path = a_run(mine, tmp_path / "runs")
    assert "checkpoint.to: cannot write to" in refusal(mine, tmp_path / "runs")
    start, _ = decide(job(), tmp_path / "runs", str(path))
    assert start.run is not None  # and nobody holds it
    start.close()


def test_a_run_that_began_with_anothers_weights_is_continued_by_the_same_command(tmp_path: Path) -> None:
    runs, folder = tmp_path / "runs", tmp_path / "elsewhere"
    with pytest.raises(JobError, match="--init-from: there is no complete checkpoint at"):
        decide_start(job(), runs=runs, resume="auto", init_from=str(folder), on_message=print)
    a_checkpoint(folder, job(seed=9))
    a_run(job(), runs)
    start = decide_start(job(), runs=runs, resume="auto", init_from=str(folder), on_message=print)
    assert start.run is None
    path = start.open(job(), runs, YAML).path
    assert path.name == "0002"
    start.close()
    for again in (str(folder), ""):
        start = decide_start(job(), runs=runs, resume="auto", init_from=again, on_message=print)
        assert start.run is not None
        assert start.run.path == path
        assert start.run.record.init == str(folder)
        start.close()
    with pytest.raises(JobError, match="--init-from: cannot stand beside a path in --resume"):
        decide_start(job(), runs=runs, resume=str(folder), init_from=str(folder), on_message=print)


# ---- launches


def test_a_damaged_checkpoint_gives_way_to_an_older_one_and_a_refusal_changes_nothing(
    box: Sandbox, reference: RunFolder
) -> None:
    stop_at(box, WAIT_AT, *LAUNCH, *JOB)
    run = run_of(box)
    record = run.record()
    newest = run.checkpoints()[-1]
    assert newest > 10
    shorter = box.run(*LAUNCH, *JOB, "--resume", "runs/digits/0001", "train.steps=3")
    assert shorter.returncode == 2, shorter.stdout
    assert f"train.steps: the checkpoint is of step {newest}, the job ends at step 3" in shorter.stderr
    assert "Traceback" not in shorter.stderr
    assert run.record() == record
    flip(shard_files(Storage(str(run.path / "checkpoints")), newest)[0])
    done = box.run(*LAUNCH, *JOB)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint of step {newest} is not usable" in done.stdout
    start = re.search(rf"from step (\d+) to step {STEPS}", done.stdout)
    assert start
    assert int(start[1]) in range(10, newest)
    assert_same_run(run, reference)


def test_checkpoints_in_s3_outlive_the_run_directory(
    box: Sandbox, reference: RunFolder, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.new_bucket(monkeypatch)
    command = (*LAUNCH, *JOB, f"checkpoint.to=s3://{bucket}/run")
    stop_at(box, WAIT_AT, *command)
    rows = run_of(box).numbers()
    shutil.rmtree(box.folder / "runs")
    done = box.run(*command)
    assert done.returncode == 0, done.stderr
    run = run_of(box)
    assert run.steps() == list(range(len(rows) + 1, STEPS + 1))
    assert rows + run.numbers() == reference.numbers()
    assert run.weights() == reference.weights()
    for extra, says in (
        ((), "holds the finished run already"),
        (("seed=3",), "holds checkpoints of another job (different: seed)"),
        ((f"checkpoint.to=s3://{bucket}-missing/run",), "cannot write to"),
    ):
        begin = time.monotonic()
        refused = box.run(*command, *extra)
        assert refused.returncode == 2, refused.stdout
        assert says in refused.stderr
        assert time.monotonic() - begin < 60
    assert run_of(box).path == run.path


@pytest.mark.slow
def test_another_world_size_goes_on_with_the_same_samples(box: Sandbox, reference: RunFolder) -> None:
    stop_at(box, 10, "launch", "--nodes", "2", *JOB)
    stop_at(box, 40, "launch", *JOB, ranks=1)
    done = box.run("launch", "--nodes", "2", "--nproc-per-node", "2", *JOB)
    assert done.returncode == 0, done.stderr
    run = run_of(box)
    assert run.steps() == reference.steps()
    assert run.losses() == pytest.approx(reference.losses(), rel=1e-5)
    names = ("train/epoch", "train/lr")
    assert [[row[n] for n in names] for row in run.rows()] == [[row[n] for n in names] for row in reference.rows()]
