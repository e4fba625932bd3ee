"""Requests that are wrong: refused with exit code 2, by file and key and with a suggestion, and nothing is left."""

from __future__ import annotations

import time
from textwrap import dedent

import pytest
from launching import Sandbox

BROKEN = """
    import math


    def helper():
        return math.sqrt(-1.0)


    helper()


    class Net:
        pass
"""


def assert_refused(box: Sandbox, *args: str, says: tuple[str, ...], within: float, **environ: str) -> str:
    before = sorted(box.folder.rglob("*"))
    begin = time.monotonic()
    done = box.run("launch", *args, **environ)
    assert done.returncode == 2, done.stdout + done.stderr
    assert time.monotonic() - begin < within
    for words in says:
        assert words in done.stderr
    assert sorted(path for path in box.folder.rglob("*") if "__pycache__" not in path.parts) == before
    return done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["recipe=cnnn"], ["recipe", "no built-in recipe 'cnnn'", "did you mean 'cnn'?"]),
        (["recipe=nowhere:Net"], ["recipe", "no module named 'nowhere'"]),
        (["recipe=broken:Nett"], ["recipe", "broken.py has no 'Nett'", "did you mean 'Net'?"]),
        (["job.yaml"], ["job.yaml", "seed", "mismatch"]),
        (["data.source=digit.npz"], ["data.source", "no such file: 'digit.npz'", "digits.npz"]),
        (["train.global_batch=1", "--nodes", "2"], ["train.global_batch", "cannot be cut into 2 microbatches"]),
        (["train.microbatches=3", "--nodes", "2"], ["train.microbatches", "cannot be dealt evenly to 2 ranks"]),
        (["tracking.wandb.mode=online"], ["tracking.wandb.mode", "no W&B API key", "wandb login"]),
        (["checkpoint.to=/proc/checkpoints"], ["checkpoint.to", "cannot write to /proc/checkpoints"]),
        (["checkpoint.to=s4://bucket/run"], ["checkpoint.to", "unknown protocol 's4://'"]),
        (["--resume", "runs/digits/0007"], ["--resume: no checkpoint at 'runs/digits/0007'"]),
        (["--address", "ray://127.0.0.1:1"], ["--address", "for Ray's client", "host:6379"]),
        (["--address", "127.0.0.1:1"], ["--address", "no Ray cluster answers at 127.0.0.1:1", "ray start --head"]),
    ],
)
def test_what_can_be_told_without_running_anything(sandbox: Sandbox, args: list[str], says: list[str]) -> None:
    (sandbox.folder / "broken.py").write_text(dedent(BROKEN), encoding="utf-8")
    (sandbox.folder / "digits.npz").touch()
    (sandbox.folder / "job.yaml").write_text("seed: mismatch\n", encoding="utf-8")
    err = assert_refused(sandbox, *args, says=tuple(says), within=45)
    assert "Traceback" not in err


@pytest.mark.parametrize("target", ["train.steps=1", "train.py"])
def test_a_place_for_runs_that_cannot_be_one(sandbox: Sandbox, target: str) -> None:
    (sandbox.folder / "train.py").touch()
    (sandbox.folder / "file").touch()
    err = assert_refused(
        sandbox, "--run-dir", "file/runs", target, says=("--run-dir: ", "file is no folder"), within=45
    )
    assert "Traceback" not in err


def test_a_recipe_that_does_not_import_is_shown_with_the_users_traceback(sandbox: Sandbox) -> None:
    (sandbox.folder / "broken.py").write_text(dedent(BROKEN), encoding="utf-8")
    says = ("recipe: importing broken failed", "broken.py", "line 9", "in helper", "ValueError: math domain error")
    err = assert_refused(sandbox, "recipe=broken:Net", says=says, within=100)
    assert "importlib" not in err
    assert "/launcher/" not in err


def test_everything_wrong_with_model_and_data_is_said_at_once(sandbox: Sandbox) -> None:
    (sandbox.folder / "digits.npz").write_bytes(b"no zip file")
    says = ("model.width", "did you mean 'widths'?", "model.hidden", "data.source", "2 problems")
    assert_refused(sandbox, "model.width=[4]", "model.hidden=-1", "data.source=digits.npz", says=says[:4], within=100)


def test_a_network_interface_that_is_not_there(sandbox: Sandbox) -> None:
    says = ("resources.network_interface", "has no network interface 'l0'", "lo")
    assert_refused(sandbox, "--network-interface", "l0", says=says, within=100)


def test_a_recipe_that_ends_the_process_is_refused(sandbox: Sandbox) -> None:
    text = "import os, signal\nprint('goodbye')\nos.kill(os.getpid(), signal.SIGSEGV)\nNet = 1\n"
    (sandbox.folder / "deadly.py").write_text(text, encoding="utf-8")
    assert_refused(sandbox, "recipe=deadly:Net", says=("recipe", "was killed by SIGSEGV", "goodbye"), within=100)
