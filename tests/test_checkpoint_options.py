"""Storage options on ``dltrain checkpoint``: every command reaches a store that nothing but them leads to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from command import dltrain
from dltrain.checkpoint.reader import catalogue
from dltrain.core.storage import Storage
from s3_server import S3Server
from safetensors.torch import save_model
from zero_saves import Net, write_job

from .checkpoints import make_state, rows, save, whole


@pytest.fixture
def elsewhere(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """A URL with two checkpoints in a store that the environment knows nothing of, and the options that lead there."""
    bucket = s3.new_bucket(monkeypatch)
    url = f"s3://{bucket}/run"
    save(Storage(url), 1, whole(make_state(1), 1))
    save(Storage(url), 2, rows(make_state(2), 2))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    values = ("key=test-key", "secret=test-secret", f"client_kwargs.endpoint_url={s3.url}")
    return url, [word for value in values for word in ("--option", value)]


def test_every_command_takes_them(elsewhere: tuple[str, list[str]], tmp_path: Path) -> None:
    url, options = elsewhere
    for command in (["ls", url], ["show", url], ["verify", url, "--all"], ["gc", url, "--keep", "1"]):
        done = dltrain("checkpoint", *command, *options)
        assert (done.code, done.err) == (0, ""), done
    save(Storage(str(tmp_path / "here")), 2, rows(make_state(2), 2))
    alike = dltrain("checkpoint", "diff", str(tmp_path / "here"), url, *options)  # only one of the two takes them
    assert (alike.code, "are alike" in alike.out) == (0, True), alike
    for target in (str(tmp_path / "hub"), f"{url}-hub", f"{url}-one/model.safetensors"):
        done = dltrain("checkpoint", "convert", url, target, *options)
        assert (done.code, done.err) == (0, ""), done
    save_model(Net(), str(tmp_path / "net.safetensors"))
    write_job(tmp_path)
    job = ("--job", str(tmp_path / "net.yaml"))
    done = dltrain("checkpoint", "import", str(tmp_path / "net.safetensors"), f"{url}-start", *job, *options)
    assert (done.code, done.err) == (0, ""), done
    settings = dict(option.split("=", 1) for option in options[1:4:2])
    storage = Storage(f"{url}-start", {**settings, "client_kwargs": {"endpoint_url": options[5].partition("=")[2]}})
    assert [entry.step for entry in catalogue(storage)] == [0]


@pytest.mark.parametrize(
    ("place", "words", "said"),
    [
        ("s3://bucket/run", ["anon"], "'anon' sets nothing"),
        ("s3://bucket/run", ["a..b=1"], "'a..b=1' sets nothing"),
        ("s3://bucket/run", ["a=1", "a.b=2"], "'a' has a value already"),
        ("here", ["anon=true"], "a local folder takes no options"),
    ],
)
def test_an_option_that_nothing_takes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(Storage("here"), 1, whole({"model.m.w": torch.ones(2)}, 1))
    done = dltrain("checkpoint", "ls", place, *(word for option in words for word in ("--option", option)))
    assert (done.code, done.out) == (2, "")
    assert said in done.err
