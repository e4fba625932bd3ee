"""``dltrain config``: what it prints loads back, names its origins, and is right for editors."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from dltrain.cli.config import job_schema, resolved_yaml, starter, yaml_value
from dltrain.core.config import load_job
from dltrain.core.document import parse_document, parse_value
from dltrain.core.job import Job
from dltrain.core.schema import leaves
from hypothesis import given
from hypothesis import strategies as st

DLTRAIN = str(Path(sys.executable).with_name("dltrain"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("DLTRAIN_")} | environ
    return subprocess.run([DLTRAIN, "config", *args], capture_output=True, text=True, timeout=60, env=env, check=False)


def write(text: str, name: str = "dltrain.yaml") -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


# show


def test_show_names_the_origin_of_every_value() -> None:
    write("train:\n  epochs: 2\nmodel: {widths: [8, 16]}\n")
    done = run("show", "seed=7", "model.deep.x=1", DLTRAIN_TRAIN__GLOBAL_BATCH="128")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "# job file: dltrain.yaml"
    origins = {text.strip(): origin for text, _, origin in (line.partition("  # ") for line in lines)}
    assert origins["epochs: 2.0"] == "dltrain.yaml:2"
    assert origins["seed: 7"] == "command line"
    assert origins["global_batch: 128"] == "DLTRAIN_TRAIN__GLOBAL_BATCH"
    assert origins["widths: [8, 16]"] == "dltrain.yaml:3"
    assert origins["log_every: 1"] == "default"
    assert len({line.index("  # ") for line in lines[1:] if "  # " in line}) == 1
    assert not re.search(r"[ \x1b]$|\x1b", done.stdout, re.MULTILINE)


def test_show_loads_back_to_the_same_job() -> None:
    job = write(
        "name: a\nmodel: {w: [1, {b: 2.5}], deep: {x: {}, y: {z: 'yes', q: '1'}}, last: '# no'}\ntrain: {steps: 5}\n"
    )
    shown = run("show", "recovery.stop_grace=1.5h").stdout
    assert load_job(write(shown, "again.yaml")).job == load_job(job, ["recovery.stop_grace=1.5h"]).job


def test_show_says_when_it_is_the_built_in_job() -> None:
    done = run("show")
    assert done.stdout.startswith("# no job file: this is the built-in digits job\nname: digits")
    assert load_job(write(done.stdout)).job == Job()


def test_show_as_json() -> None:
    done = run("show", write("seed: 3\n", "job.yml").name, "--json", "train.epochs=1")
    answer = json.loads(done.stdout)
    assert answer["file"] == "job.yml"
    assert Job.model_validate(answer["job"]) == Job.model_validate({"seed": 3, "train": {"epochs": 1.0}})
    assert answer["origins"]["seed"] == "job.yml:1"
    assert answer["origins"]["train.epochs"] == "command line"


def test_show_refuses_what_is_wrong() -> None:
    write("train: {epoch: 2}\n")
    done = run("show", "data.prefetch=x", "recipe=nowhere:Mine")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "dltrain: 3 problems; nothing was started",
        "  dltrain.yaml:1: train.epoch: unknown key 'epoch'",
        "      did you mean 'epochs'?",
        "  command line: data.prefetch: expected a whole number of at least 0, found the text 'x'",
        "  command line: recipe: no module named 'nowhere'",
        f"      looked in {Path.cwd()} and on the Python path",
    ]
    assert "did you mean 'cnn'?" in run("show", write("recipe: cn\n", "b.yaml").name).stderr
    assert "'train.py' is a script" in run("show", "train.py").stderr


def test_show_colours_a_terminal_only() -> None:
    def on_terminal(**environ: str) -> str:
        leader, follower = pty.openpty()
        env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")} | {"TERM": "xterm"} | environ
        with subprocess.Popen([DLTRAIN, "config", "show", "seed=1"], stdout=follower, stderr=follower, env=env):
            os.close(follower)
            output = b""
            with contextlib.suppress(OSError):  # the end of a terminal's output is an error on Linux
                while chunk := os.read(leader, 1 << 16):
                    output += chunk
        os.close(leader)
        return output.decode()

    coloured = on_terminal()
    assert "\x1b[2m  # default\x1b[0m" in coloured
    assert re.search(r"seed: 1 +# command line\r", coloured)
    assert "\x1b" not in on_terminal(NO_COLOR="1")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    command = f'"$0" config show {closed}'
    done = subprocess.run(["sh", "-c", command, DLTRAIN], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("epochs: 20" in done.stdout) == (closed in ("<&-", "2>&-"))


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(f"{DLTRAIN} config schema | head -1", shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{\n", "")


# schema


def test_the_schema_takes_what_the_loader_takes() -> None:
    schema = json.loads(run("schema").stdout)
    assert schema == job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    for text in ("{}", "train:\nmodel:\n", "recovery: {stop_grace: 10min}", "train: {steps: null, microbatches: auto}"):
        assert check.is_valid(parse_document(text, "").value), text
        load_job(write(text))
    check.validate(Job().model_dump(mode="json"))
    check.validate(parse_document("\n".join(starter()), "").value)
    for text in ("{epochs: 3}", "train: {epochs: -1}", "train: {optimizer: {name: Adam}}", "data: 3", "name: a b"):
        assert not check.is_valid(parse_document(text, "").value), text


def test_every_key_is_described() -> None:
    assert [".".join(key) for key, field in leaves(Job) if not field.description] == []


# init


def test_init_writes_the_default_job() -> None:
    done = run("init")
    assert (done.returncode, done.stderr) == (0, "")
    assert "dltrain launch dltrain.yaml" in done.stdout
    resolved = load_job(Path("dltrain.yaml"))
    assert resolved.job == Job()
    assert {key for key, origin in resolved.origins.items() if origin != "default"} == {
        "name", "recipe", "data.source", "train.epochs", "train.global_batch", "train.optimizer.lr", "resources.nodes",
    }  # fmt: skip


def test_every_key_of_the_starter_can_be_uncommented() -> None:
    text = "\n".join(re.sub(r"^( *)#(?=\w+:)", r"\1", line) for line in starter())
    resolved = load_job(write(text))
    assert resolved.job == Job()
    unset = {key for key, origin in resolved.origins.items() if origin == "default"}
    assert unset == set()


def test_the_starter_tells_editors_where_the_schema_is() -> None:
    assert "# yaml-language-server: $schema=dltrain.schema.json" in starter()
    assert max(len(line) for line in starter()) <= 120


def test_init_replaces_nothing_unasked(folder: Path) -> None:
    write("mine: 1\n")
    done = run("init")
    assert done.returncode == 2
    assert "this file exists" in done.stderr
    assert "--force" in done.stderr
    assert Path("dltrain.yaml").read_text(encoding="utf-8") == "mine: 1\n"
    assert run("init", "--force").returncode == 0
    assert load_job(Path("dltrain.yaml")).job == Job()
    assert [path.name for path in folder.iterdir()] == ["dltrain.yaml"]


def test_init_elsewhere() -> None:
    Path("jobs").mkdir()
    assert run("init", "jobs/a.yaml").returncode == 0
    assert load_job(Path("jobs/a.yaml")).job == Job()
    assert "name a file: jobs/dltrain.yaml" in run("init", "jobs").stderr
    assert "the folder nowhere does not exist" in run("init", "nowhere/a.yaml").stderr


# Values in one line


CHARACTERS = st.characters(exclude_categories=["Cs"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(CHARACTERS)
KEYS = st.text(CHARACTERS, max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


@given(VALUES)
def test_every_value_reads_back_as_itself(value: Any) -> None:
    text = yaml_value(value)
    assert "\n" not in text
    read = parse_document(f"key: {text}", "").value["key"]
    assert repr(read) == repr(value)


@given(VALUES)
def test_every_value_can_be_given_on_the_command_line(value: Any) -> None:
    assert repr(parse_value(yaml_value(value))) == repr(value)


@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_every_model_shown_loads_back(model: dict[str, Any]) -> None:
    resolved = load_job(None)
    job = resolved.job.model_copy(update={"model": model})
    text = "\n".join(resolved_yaml(type(resolved)(job, _Defaults(), None)))
    assert repr(parse_document(text, "").value["model"]) == repr(model)


class _Defaults(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "default"


def test_not_a_number_reads_back() -> None:
    assert math.isnan(parse_document(f"a: {yaml_value(math.nan)}", "").value["a"])
