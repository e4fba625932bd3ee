"""Job files, environment and command line: what they resolve to, and how their mistakes are worded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dltrain.core.config import job_values, load_job
from dltrain.core.document import parse_document, parse_value
from dltrain.core.errors import JobError, Problem
from dltrain.core.job import Job
from hypothesis import given
from hypothesis import strategies as st
from jobfiles import load, problem, problems

pytestmark = pytest.mark.usefixtures("empty_folder")


# What wins


def test_command_line_beats_environment_beats_file_beats_default() -> None:
    text = "train:\n  epochs: 1\n  global_batch: 8\n  log_every: 7\n"
    resolved = load(text, "train.epochs=3", DLTRAIN_TRAIN__EPOCHS="2", DLTRAIN_TRAIN__GLOBAL_BATCH="16", HOME="/root")
    train = resolved.job.train
    assert (train.epochs, train.global_batch, train.log_every, train.last_step) == (3, 16, 7, "pad")
    assert resolved.origins["train.epochs"] == "command line"
    assert resolved.origins["train.global_batch"] == "DLTRAIN_TRAIN__GLOBAL_BATCH"
    assert resolved.origins["train.log_every"] == "dltrain.yaml:4"
    assert resolved.origins["train.last_step"] == "default"
    assert resolved.path == Path("dltrain.yaml")


def test_every_value_has_an_origin_in_the_order_of_the_schema() -> None:
    resolved = load("model: {widths: [8], deep: {a: 1}}\n")
    assert list(resolved.origins) == [".".join(key) for key, _ in job_values(resolved.job)]
    assert resolved.origins["model.widths"] == "dltrain.yaml:1"
    assert resolved.origins["model.deep.a"] == "dltrain.yaml:1"


@pytest.mark.parametrize("text", [None, "", "# nothing\n", "train:\nmodel:\n", "{}", "null"])
def test_what_says_nothing_is_the_default_job(text: str | None) -> None:
    resolved = load(text)
    assert resolved.job == Job()
    assert set(resolved.origins.values()) == {"default"}


def test_options_stand_beside_overrides() -> None:
    resolved = load_job(None, (), {"resources.nodes": 2, "recovery.max_restarts": 1}, {})
    assert (resolved.job.resources.nodes, resolved.job.recovery.max_restarts) == (2, 1)
    assert resolved.origins["resources.nodes"] == "command line"


def test_an_option_that_contradicts_an_override_is_refused() -> None:
    with pytest.raises(JobError, match="given twice"):
        load_job(None, ("resources.nodes=2",), {"resources.nodes": 3}, {})
    assert load_job(None, ("resources.nodes=3",), {"resources.nodes": 3}, {}).job.resources.nodes == 3


def test_mappings_merge_key_by_key_and_lists_are_replaced() -> None:
    text = "model: {a: 1, b: {c: 2, d: [1, 2]}}\ntrain: {optimizer: {lr: 0.1, momentum: 0.5}}\n"
    job = load(text, "model.b.d=[3]", "model.e=x", "train.optimizer={lr: 0.2}").job
    assert job.model == {"a": 1, "b": {"c": 2, "d": [3]}, "e": "x"}
    assert (job.train.optimizer.lr, job.train.optimizer.momentum) == (0.2, 0.5)


def test_an_empty_mapping_clears_and_a_value_replaces_what_lies_below() -> None:
    assert load("model: {a: {b: 1}}\n", "model={}").job.model == {}
    assert load("model: {a: {b: 1}}\n", "model.a=3").job.model == {"a": 3}
    assert load("model: {a: 3}\n", "model.a.b=1").job.model == {"a": {"b": 1}}


def test_the_last_override_wins() -> None:
    assert load(None, "seed=1", "seed=2").job.seed == 2


# YAML


def test_yaml_is_version_1_2() -> None:
    text = "{a: 1e-3, b: yes, c: 012, d: 2024-01-01, e: on, f: 1:30, g: 0x1F, h: 0o17, i: ~, j: -.inf, k: '1', l: TRUE}"
    assert parse_document(text, "f").value == {
        "a": 0.001,
        "b": "yes",
        "c": 12,
        "d": "2024-01-01",
        "e": "on",
        "f": "1:30",
        "g": 31,
        "h": 15,
        "i": None,
        "j": float("-inf"),
        "k": "1",
        "l": True,
    }


def test_json_job_files_work() -> None:
    Path("job.json").write_text('{"train": {"epochs": 2, "optimizer": {"lr": 1e-2}}, "name": "a"}', encoding="utf-8")
    job = load_job(Path("job.json")).job
    assert (job.train.epochs, job.train.optimizer.lr, job.name) == (2, 0.01, "a")


def test_the_directory_of_a_relative_job_file_is_in_the_origin() -> None:
    Path("jobs").mkdir()
    Path("jobs/a.yaml").write_text("\nseed: 3\n", encoding="utf-8")
    assert load_job(Path("jobs/a.yaml")).origins["seed"] == "jobs/a.yaml:2"


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("name: a\nseed: [1\n", "dltrain.yaml:3:1", "flow sequence that starts on line 2"),
        ("name: a: b\n", "dltrain.yaml:1:8", "mapping values are not allowed here"),
        ("train:\n\tepochs: 1\n", "dltrain.yaml:2:1", "indent with spaces"),
        ("name: @x\n", "dltrain.yaml:1:7", "put the text in quotes"),
        ("  name: a\n seed: 1\n", "dltrain.yaml:2:2", "check the indentation"),
        ("name: a\n---\nname: b\n", "dltrain.yaml:2:1", "second document"),
        ("name: *x\n", "dltrain.yaml:1:7", "undefined alias"),
        ("name: \x00\n", "dltrain.yaml:1:7", "control character"),
        ("model: " + "[" * 5000, "dltrain.yaml", "nested too deeply"),
    ],
)
def test_syntax_errors_have_line_and_column(text: str, where: str, says: str) -> None:
    found = problem(text)
    assert found.where == where
    assert says in str(found)


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("seed: 1\ntrain: {epochs: 1}\nseed: 2\n", "dltrain.yaml:3: seed", "given twice (first on line 1)"),
        ("model:\n  a: 1\n  a: 2\n", "dltrain.yaml:3: model.a", "given twice (first on line 2)"),
        ("model:\n  <<: {a: 1}\n", "dltrain.yaml:2: model", "merge keys"),
        ("seed: !!python/name 1\n", "dltrain.yaml:1: seed", "tag"),
        ("model: &x {a: *x}\n", "dltrain.yaml:1: model.a", "refers to what contains it"),
        ("? [a]\n: 1\n", "dltrain.yaml:1", "must be text"),
        ("- a\n", "dltrain.yaml", "found the list ['a']"),
        ("digits\n", "dltrain.yaml", "found the text 'digits'"),
    ],
)
def test_yaml_that_means_no_job_is_refused(text: str, where: str, says: str) -> None:
    found = problem(text)
    assert found.where == where
    assert says in found.what


def test_a_file_that_is_not_there_names_its_neighbours() -> None:
    Path("train.yaml").touch()
    Path("other.yaml").touch()
    for name in ("trian.yaml", "train.yml"):
        with pytest.raises(JobError) as caught:
            load_job(Path(name))
        assert caught.value.problems == (Problem("no such file", name, "did you mean 'train.yaml'?"),)
    with pytest.raises(JobError, match=r"there are: other\.yaml, train\.yaml"):
        load_job(Path("zzz.json"))
    with pytest.raises(JobError, match="the folder jobs does not exist"):
        load_job(Path("jobs/train.yaml"))


def test_what_is_no_text_file_is_refused(empty_folder: Path) -> None:
    Path("latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(JobError, match="not UTF-8 text"):
        load_job(Path("latin.yaml"))
    with pytest.raises(JobError, match="a folder, not a job file"):
        load_job(empty_folder)


def test_a_byte_order_mark_is_no_key() -> None:
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load_job(Path("bom.yaml")).job.seed == 3


# Values on the command line and in the environment


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        (" 3 ", 3),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("'3'", "3"),
        ("run #3: a", "run #3: a"),
        ("*.npz", "*.npz"),
        ("@x", "@x"),
        ("yes", "yes"),
        ("", None),
        ("null", None),
        ("s3://bucket/key", "s3://bucket/key"),
    ],
)
def test_a_value_is_a_scalar_taken_whole_or_a_flow_collection(text: str, value: Any) -> None:
    assert parse_value(text) == value


@given(st.text(alphabet=st.characters(exclude_categories=("Cs", "Cc"))))
def test_no_value_is_ever_cut_or_crashes(text: str) -> None:
    try:
        value = parse_value(text)
    except JobError:
        assert text.strip().startswith(("[", "{", '"', "'"))
    else:
        if isinstance(value, str) and not text.strip().startswith(('"', "'")):
            assert value == text.strip()


@pytest.mark.parametrize(
    ("override", "where", "says"),
    [
        ("epochs", "command line", "write key.path=value"),
        ("=3", "command line", "write key.path=value"),
        ("train..lr=3", "command line", "write key.path=value"),
        ("trian.epochs=2", "command line: trian.epochs", "did you mean 'train'?"),
        ("train.epochs.x=2", "command line: train.epochs.x", "no keys below it"),
        ("train=5", "command line: train", "expected the keys of a section, found the number 5"),
        ("name=[a", "command line: name", "not valid YAML"),
        ("model={a: 1, a: 2}", "command line: model", "given twice"),
        ("train={epoch: 2}", "command line: train.epoch", "did you mean 'epochs'?"),
    ],
)
def test_wrong_overrides(override: str, where: str, says: str) -> None:
    found = problem(None, override)
    assert found.where == where
    assert says in str(found)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("DLTRAIN_TRAIN_EPOCHS", "did you mean DLTRAIN_TRAIN__EPOCHS?"),
        ("DLTRAIN_TRAIN__EPOCH", "did you mean DLTRAIN_TRAIN__EPOCHS?"),
        ("DLTRAIN_DEBUG_LEVEL_X", "DLTRAIN_… are keys of the job"),
    ],
)
def test_unknown_variables_with_the_prefix_are_refused(name: str, hint: str) -> None:
    assert problem(None, **{name: "1"}) == Problem("names no key of a job", name, hint)


def test_variables_reach_free_mappings_and_are_typed() -> None:
    job = load(None, DLTRAIN_MODEL__HIDDEN="32", DLTRAIN_DATA__NORMALIZE="false", DLTRAIN_NAME="x").job
    assert (job.model, job.data.normalize, job.name) == ({"hidden": 32}, False, "x")
    assert problem(None, DLTRAIN_SEED="x").where == "DLTRAIN_SEED: seed"


# What is wrong with a value


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("seed: yes", "expected a whole number of at least 0 and below 9223372036854775808, found the text 'yes'", ""),
        ("name: 12", "found the number 12", "quotes make it text: '12'"),
        ("name: a b", "that matches ^[A-Za-z0-9]", ""),
        ("data: {normalize: on}", "expected true or false, found the text 'on'", "write true or false"),
        ("data: {normalize: 1}", "expected true or false, found the number 1", ""),
        ("train: {epochs: '3'}", "expected a number above 0, found the text '3'", "write it without quotes"),
        ("train: {epochs: true}", "expected a number above 0, found true", ""),
        ("train: {steps: 1e3}", "expected a whole number above 0 or null, found the number 1000.0", "write 1000"),
        ("train: {steps: {a: 1}}", "found the mapping {'a': 1}", ""),
        ("train: {microbatches: atuo}", "expected a whole number above 0 or 'auto'", "did you mean 'auto'?"),
        ("train: {last_step: 3}", "expected 'pad' or 'drop', found the number 3", ""),
        (
            "train: {optimizer: {name: Adam}}",
            "expected 'sgd', 'adam', 'adamw', 'adafactor' or 'muon'",
            "did you mean 'adam'?",
        ),
        ("train: {optimizer: {betas: [0.9]}}", "expected a list of 2 numbers, found the list [0.9]", ""),
        ("train: {optimizer: {betas: [0.9, x]}}", "expected a list of 2 numbers, found the list [0.9, 'x']", ""),
        ("data: {prefetch: null}", "expected a whole number of at least 0, found nothing (null)", ""),
        ("model: 3", "expected a mapping, found the number 3", ""),
        ("resources: [1]", "expected the keys of a section, found the list [1]", ""),
        ("recovery: {stop_grace: 1y}", "'1y' is no duration", ""),
        ("data: {split: {train: 0.5}}", "train + val + test must be 1, not 0.7", ""),
    ],
)
def test_wrong_values_say_what_was_found_and_what_is_right(text: str, what: str, hint: str) -> None:
    found = problem(text)
    assert what in found.what
    assert found.hint == hint
    assert found.where.startswith("dltrain.yaml:1: ")


@pytest.mark.parametrize(
    ("text", "where", "hint"),
    [
        ("train: {epoch: 3}", "train.epoch", "did you mean 'epochs'?"),
        ("global_batch: 3", "global_batch", "'global_batch' belongs under 'train'"),
        ("train: {lr: 3}", "train.lr", "'lr' belongs under 'train.optimizer'"),
        ("epoch: 3", "epoch", "did you mean 'train.epochs'?"),
        ("train: {global-batch: 3}", "train.global-batch", "did you mean 'global_batch'?"),
        ("Seed: 3", "Seed", "did you mean 'seed'?"),
        ("train.epochs: 3", "train.epochs", "write it nested: one level a line"),
        ("data: {split: {tset: 0.1}}", "data.split.tset", "did you mean 'test'?"),
        ("data: {split: {zzz: 0.1}}", "data.split.zzz", "known: test, train, val"),
    ],
)
def test_unknown_keys_name_the_key_that_was_meant(text: str, where: str, hint: str) -> None:
    found = problem(text)
    assert found.where == f"dltrain.yaml:1: {where}"
    assert found.what.startswith("unknown key")
    assert found.hint == hint


def test_every_problem_is_reported_at_once() -> None:
    text = "seed: x\nglobl_batch: 3\ntrain:\n  epochs: -1\nrecipe: cn\n"
    found = problems(text, "train.log_every=0", "nope=1", DLTRAIN_NOPE="1")
    assert [f.where for f in found] == [
        "dltrain.yaml:2: globl_batch",
        "DLTRAIN_NOPE",
        "command line: nope",
        "dltrain.yaml:1: seed",
        "dltrain.yaml:4: train.epochs",
        "command line: train.log_every",
        "dltrain.yaml:5: recipe",
    ]


def test_no_message_is_pydantics() -> None:
    text = "seed: x\nname: 3\nmodel: 1\ntrain: {epochs: [], steps: '1', microbatches: {}, clip_norm: a}\n"
    for found in problems(text):
        assert "Input should" not in str(found)
        assert "pydantic" not in str(found)
