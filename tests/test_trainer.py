"""The step loop in this process, as one rank alone: what it takes up, what it leaves, and what it says."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import flip, shard_files
from dltrain.checkpoint.reader import catalogue, open_manifest, read
from dltrain.core.errors import JobError
from dltrain.core.job import Job
from dltrain.core.pulse import Pulse
from dltrain.core.storage import Storage
from dltrain.core.wire import Channel, Message
from dltrain.training.context import from_environment
from dltrain.training.loop import Trainer
from dltrain.training.memory import Memory
from dltrain.training.persistence import Persister
from dltrain.training.reporter import ChannelReporter

JOB: dict[str, Any] = {"model": {"widths": [2], "hidden": 4}, "train": {"steps": 4, "evaluate_every": 100}}


def train(folder: Path, *restore: Path, init_from: str = "", **changes: dict[str, Any]) -> list[Message]:
    """Train the job with ``changes`` and checkpoints in ``folder``; what its persister told the agent."""
    values = {key: JOB.get(key, {}) | changes.get(key, {}) for key in JOB | changes}
    job = Job.model_validate(values)
    ours, theirs = (Channel(sock) for sock in socket.socketpair())
    news, its_news = socket.socketpair()
    heard = Channel(news)
    heard.send({"t": "settled", "step": 1000})  # before it is asked: the metrics are no concern here
    persister = Persister(its_news)
    persister.open(url=str(folder), options={}, rank=0, keep=3, best={"metric": None, "goal": "min"}, lease="")
    reporter = ChannelReporter(theirs)
    storage = Storage(str(folder))
    state = torch.get_rng_state()
    try:
        ctx = from_environment({})
        trainer = Trainer(
            job,
            ctx=ctx,
            device=torch.device("cpu"),
            storage=storage,
            persister=persister,
            memory=Memory(job, ctx, hold=None),
            reporter=reporter,
            pulse=Pulse.create(),
        )
        trainer.run(restore_urls=[str(folder), *map(str, restore)], tracking={}, init_from=init_from)
        return heard.receive()
    finally:
        torch.set_rng_state(state)
        persister.close()
        its_news.close()
        heard.close()
        ours.close()
        theirs.close()


def steps(folder: Path) -> list[int]:
    return [entry.step for entry in catalogue(Storage(str(folder)))]


def test_a_run_that_begins_at_anothers_end_has_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    train(tmp_path / "one")
    train(tmp_path / "two", tmp_path / "one")
    assert steps(tmp_path / "two") == steps(tmp_path / "one") == [4]


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    train(tmp_path, train={"optimizer": {"name": "sgd"}})
    with pytest.raises(JobError, match=r"train\.optimizer: the checkpoint of step 4 has no optimizer\..*exp_avg"):
        train(tmp_path)


def test_where_no_checkpoint_is_whole_nothing_is_begun_over_them(tmp_path: Path) -> None:
    train(tmp_path, checkpoint={"every": 2})
    for step in (2, 4):
        flip(shard_files(Storage(str(tmp_path)), step)[0])
    with pytest.raises(JobError, match=r"no checkpoint in .* is usable: rank 0: checkpoint step-00000004 is corrupt"):
        train(tmp_path)
    assert steps(tmp_path) == [4, 2]


def test_a_checkpoint_before_the_first_row_of_metrics_waits_for_none(tmp_path: Path) -> None:
    said = train(tmp_path, train={"log_every": 100}, checkpoint={"every": 1})
    waited = [message["step"] for message in said if message["t"] == "settle"]
    assert waited == [4]
    saved = [message["step"] for message in said if message["t"] == "saved"]
    assert saved[0] == 1
    assert saved == sorted(saved)
    assert saved[-1] == 4


def test_a_run_may_begin_with_anothers_weights_alone(tmp_path: Path) -> None:
    train(tmp_path / "one", train={"steps": 3, "ema": 0.5})
    before = read(Storage(str(tmp_path / "one")), open_manifest(Storage(str(tmp_path / "one")), 3))
    still = {"steps": 1, "ema": 0.5, "optimizer": {"name": "sgd", "lr": 1e-30, "momentum": 0.0, "weight_decay": 0.0}}
    train(tmp_path / "two", init_from=str(tmp_path / "one"), train=still)
    storage = Storage(str(tmp_path / "two"))
    manifest = open_manifest(storage, 1)
    assert manifest.cursor.step == 1
    after = read(storage, manifest)
    weights = [name for name in before if name.startswith("model.") and before[name].is_floating_point()]
    weights = [name for name in weights if "running" not in name]  # which every batch changes
    assert weights
    for name in weights:
        assert torch.equal(after[name], before[name])
        if (average := name.replace("model.", "ema.", 1)) in after:
            assert torch.equal(after[average], before[name])  # not the other run's average
    train(tmp_path / "three", init_from=str(tmp_path / "one"), train={"steps": 1})
    third = read(Storage(str(tmp_path / "three")), open_manifest(Storage(str(tmp_path / "three")), 1))
    train(tmp_path / "half", init_from=str(tmp_path / "one"), train={"steps": 1, "precision": "fp16"})
    half = read(Storage(str(tmp_path / "half")), open_manifest(Storage(str(tmp_path / "half")), 1))
    assert any(name.startswith("scaling.") for name in half)
    counts = [value for name, value in third.items() if name.endswith(".step")]
    assert counts
    assert all(float(count) == 1 for count in counts)  # and not 4
    wider = {"widths": [3], "hidden": 4}
    with pytest.raises(
        JobError, match=r"--init-from: the weights of step 3 do not fit .* is \[2, .* there, \[3, .* here"
    ):
        train(tmp_path / "four", init_from=str(tmp_path / "one"), model=wider)
    assert not steps(tmp_path / "four")
