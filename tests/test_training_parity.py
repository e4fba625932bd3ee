"""The built-in job against a plain PyTorch loop: the same numbers on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
import torch
from launching import Sandbox
from plain_cnn import JOB, plain
from runs import RunFolder
from safetensors.torch import load_file


def check(run: RunFolder, weights: Path) -> None:
    losses, norms, state, accuracy = plain()
    rows = run.rows()
    assert len(rows) == len(losses)
    torch.testing.assert_close([r["train/loss"] for r in rows], losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([r["train/grad_norm"] for r in rows], norms, rtol=1e-3, atol=1e-4)
    assert rows[-1]["test/accuracy"] == pytest.approx(accuracy, abs=0.005)  # one sample of 233 may sit on the fence
    trained = load_file(weights)
    assert trained.keys() == state.keys()
    for name, value in trained.items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-4)


def test_any_number_of_ranks_computes_what_one_plain_process_does(sandbox: Sandbox) -> None:
    two = ("--nproc-per-node", "2")
    for ranks in (("--nproc-per-node", "1"), two, ("--nodes", "2", *two), (*two, "parallel.strategy=fsdp")):
        done = sandbox.run("launch", *ranks, "--resume", "never", *JOB)
        assert done.returncode == 0, done.stderr
        run = RunFolder((sandbox.folder / "runs/digits/latest").resolve())
        check(run, run.path / "weights.safetensors")


def test_the_rank_program_gives_the_same_bits_under_torchrun(sandbox: Sandbox) -> None:
    for _ in range(2):
        done = sandbox.run("launch", "--nproc-per-node", "2", "--resume", "never", *JOB)
        assert done.returncode == 0, done.stderr
    command = ("--standalone", "--log-dir", "elastic", "--nproc-per-node", "2", "-m", "dltrain.training.worker", *JOB)
    done = sandbox.run(*command, command="torchrun", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    first, again, torchrun = (RunFolder(sandbox.folder / "runs/digits" / name) for name in ("0001", "0002", "torchrun"))
    assert first.numbers() == again.numbers() == torchrun.numbers()
    assert first.weights() == again.weights()


NORMALIZED = """
    import os
    import dltrain
    from torch import nn
    from torch.nn import functional

    class Normalized(dltrain.Recipe):
        def parts(self):
            return {"net": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))}
        def loss(self, part, parts, batch):
            return functional.cross_entropy(parts[part](batch["x"]), batch["y"])
        def metrics(self, parts, batch):
            with open(f"evaluated-{os.environ['RANK']}", "a") as file:
                print(parts["net"][1].running_mean.tolist(), parts["net"][1].running_var.tolist(), file=file)
            return {"accuracy": (parts["net"](batch["x"]).argmax(1) == batch["y"]).float()}
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_running_statistics_are_rank_0s_when_evaluated_and_saved(sandbox: Sandbox, strategy: str) -> None:
    (sandbox.folder / "normalized.py").write_text(dedent(NORMALIZED), encoding="utf-8")
    job = ("recipe=normalized:Normalized", "train.steps=6", "train.evaluate_every=3", "tracking.wandb.mode=disabled")
    job += (f"parallel.strategy={strategy}",)
    done = sandbox.run("launch", "--nproc-per-node", "2", *job)
    assert done.returncode == 0, done.stderr
    zero, one = (set((sandbox.folder / f"evaluated-{rank}").read_text().splitlines()) for rank in (0, 1))
    assert zero == one
    assert len(zero) == 2
    saved = load_file(sandbox.folder / "runs/digits/latest/weights.safetensors")
    assert f"{saved['1.running_mean'].tolist()} {saved['1.running_var'].tolist()}" in zero
