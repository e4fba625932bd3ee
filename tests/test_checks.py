"""Jobs whose values do not fit each other, the world or what is there: refused, and how that is worded."""

from __future__ import annotations

from pathlib import Path

import pytest
from dltrain.core.checks import check_job
from dltrain.core.config import load_job
from dltrain.core.errors import JobError, Problem
from dltrain.core.job import Job
from jobfiles import load, problem

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_microbatches_must_fit_the_world() -> None:
    found = problem("train:\n  microbatches: 10\nresources: {nodes: 3, nproc_per_node: 3}\n")
    assert found == Problem(
        "10 microbatches cannot be dealt evenly to 9 ranks", "dltrain.yaml:2: train.microbatches", "9 would do"
    )
    found = problem("train: {global_batch: 3}\n", "resources.nodes=2", "resources.nproc_per_node=4")
    assert found.where == "dltrain.yaml:1: train.global_batch"
    assert load("train: {global_batch: 3}\n", "resources.nodes=8").job.resources.nodes == 8  # ranks unknown: later


def test_a_scripts_launch_does_not_check_the_built_in_job_against_the_world() -> None:
    flags = {"resources.nodes": 32, "resources.nproc_per_node": 8}
    with pytest.raises(JobError, match="256 microbatches"):
        load_job(None, (), flags)
    assert load_job(None, (), flags, whole=False).job.resources.nodes == 32


def test_a_known_world_is_checked_without_resources() -> None:
    job = Job.model_validate({"train": {"microbatches": 3}})
    assert [p.where for p in check_job(job, world=2)] == ["train.microbatches"]
    assert check_job(job, world=3) == []


def test_data_sources() -> None:
    Path("digits.npz").touch()
    assert load(None, "data.source=digits.npz").job.data.source == "digits.npz"
    assert problem(None, "data.source=digit.npz").hint == "did you mean 'digits.npz'?"
    assert problem("data:\n  source: digit\n") == Problem(
        "no data source 'digit'", "dltrain.yaml:2: data.source", "did you mean 'digits'?"
    )
    Path("mydata.py").write_text("def load(): ...\n", encoding="utf-8")
    assert load(None, "data.source=mydata:load").job.data.source == "mydata:load"
    assert problem(None, "data.source=mydata:laod").hint == "did you mean 'load'?"


def test_files_are_looked_for_and_their_format_is_told_by_their_name() -> None:
    for name in ("a.csv.gz", "odd.dat"):
        Path(name).touch()
    Path("photos").mkdir()
    for source in ("a.csv.gz", "photos", "s3://bucket/photos", "s3://bucket/odd.dat"):
        assert load(None, f"data.source={source}").job.data.source == source
    assert problem(None, "data.source=a.csv") == Problem(
        "no such file: 'a.csv'", "command line: data.source", "did you mean 'a.csv.gz'?"
    )
    assert problem(None, "data.source=folder/photos").hint == "the folder folder does not exist"
    assert "tells no format" in problem(None, "data.source=odd.dat").what
    assert load(None, "data.source=odd.dat", "data.format=npz").job.data.format == "npz"


def test_what_says_nothing_about_a_source_is_refused() -> None:
    assert problem(None, "data.storage.anon=true").where == "command line: data.storage"
    assert problem(None, "data.format=csv").what == "only a file or folder has a format"
    assert load(None, "data.source=s3://b/x.npz", "data.storage.anon=true").job.data.storage == {"anon": True}


@pytest.mark.parametrize(
    "text",
    [
        "checkpoint: {to: 's3://b/run', options: {key: A}}",
        "checkpoint: {to: 's3://b/run', options: {client_kwargs: {aws_secret_access_key: A}}}",
        "data: {source: 's3://b/x.npz', options: {secret: A}}",
        "data: {source: 's3://b/x.npz', storage: {client_kwargs: {aws_secret_access_key: A}}}",
    ],
)
def test_credentials_are_refused(text: str) -> None:
    assert "belong in the environment" in problem(text).what


def test_a_function_of_ones_own_may_take_a_key() -> None:
    Path("mine.py").write_text("def data(key): ...\n", encoding="utf-8")
    assert load("data: {source: 'mine:data', options: {key: x}}").job.data.options == {"key": "x"}


def test_recipes() -> None:
    Path("mine.py").write_text("class Mine: ...\n", encoding="utf-8")
    assert load(None, "recipe=mine:Mine").job.recipe == "mine:Mine"
    assert problem(None, "recipe=mine:Mina").where == "command line: recipe"
    assert "did you mean 'cnn'?" in problem(None, "recipe=cn").hint
    assert load(None, "recipe=anything", recipes=()).job.recipe == "anything"


def test_storage_protocols() -> None:
    assert load(None, "checkpoint.to=s3://bucket/run").job.checkpoint.to == "s3://bucket/run"
    assert problem("checkpoint:\n  to: s4://b\n") == Problem(
        "unknown protocol 's4://'", "dltrain.yaml:2: checkpoint.to", "known: file, gs, s3"
    )
    assert "needs the package ocifs" in problem(None, "checkpoint.to=oci://b").what


def test_evaluating_on_nothing_is_refused() -> None:
    found = problem("train: {evaluate_every: 5}\ndata: {split: {train: 0.9, val: 0, test: 0.1}}\n")
    assert found.where == "dltrain.yaml:1: train.evaluate_every"
