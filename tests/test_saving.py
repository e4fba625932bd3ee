"""Snapshots that are written in the background: by persisters that are killed, to storages that fail, in time."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import savers
from checkpoints import assert_same, newest, rows
from dltrain.checkpoint.reader import catalogue, open_manifest
from dltrain.checkpoint.saving import Snapshot, description
from dltrain.checkpoint.writer import assign, held, shard_name
from dltrain.core.storage import Storage
from dltrain.core.wire import Channel, Message
from dltrain.launcher.generation import Generation
from dltrain.launcher.intake import Intake
from dltrain.launcher.messages import RankEvent
from dltrain.launcher.view import PlainView
from dltrain.training.persistence import Persister
from dltrain.training.staging import Holdings, ImagePlan, Stage
from launching import Sandbox, said, wait_for
from ranks import run_ranks, train_ranks
from runs import RunFolder
from savers import state_of
from stage import JOB, LAUNCH, STEPS, WAIT_AT, gate, put_recipe, wait_at_gate

if TYPE_CHECKING:
    from s3_server import S3Server

MODEL = ("model.widths=[4]", "model.hidden=8", "train.microbatches=2")


def steps(run: RunFolder) -> list[int]:
    return [entry.step for entry in catalogue(Storage(str(run.path / "checkpoints")))]


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path: Path) -> None:
    job = ("train.steps=24", "train.evaluate_every=3", "checkpoint.keep=1", "checkpoint.keep_best=val/accuracy")
    run = train_ranks(tmp_path, 2, *MODEL, *job, "checkpoint.keep_best_goal=max", "train.optimizer.lr=0.02")
    storage = Storage(str(run.path / "checkpoints"))
    kept = steps(run)
    assert kept[0] == 24
    assert len(kept) <= 2
    rated = {step: open_manifest(storage, step).extra["evaluated"] for step in kept}
    values = {row["step"]: row["val/accuracy"] for row in run.rows() if "val/accuracy" in row}
    for step, found in rated.items():
        assert isinstance(found, dict)
        assert found["val/accuracy"] == values[step]


def test_a_checkpoint_is_due_by_the_clock_on_every_rank_at_once(tmp_path: Path) -> None:
    run = train_ranks(tmp_path, 2, *MODEL, "train.steps=300", "checkpoint.every=0.05s", "checkpoint.keep=99")
    found = steps(run)
    assert found[0] == 300
    assert len(found) > 1  # each of one step, or there would be no manifest


# ---- killed


def check(storage: Storage, *, at_least: int = 0) -> int:
    """The newest checkpoint's step, after comparing every bit of it."""
    step, state = newest(storage)
    assert step >= at_least
    assert_same(state, state_of(step))
    return step


@pytest.mark.slow
def test_a_save_that_is_killed_at_any_change_of_the_storage_leaves_the_one_before(
    local: Storage, tmp_path: Path
) -> None:
    assert run_ranks(savers.dies_at, 1, tmp_path, str(local), 1, 10_000) == [0]
    at, step = 0, 2
    while run_ranks(savers.dies_at, 1, tmp_path, str(local), step, at) != [0]:
        assert check(local) in (step - 1, step)
        step += check(local) == step
        at += 1
    assert at > 20
    assert check(local) == step


@pytest.mark.parametrize(("world", "kills"), [(2, 4), pytest.param(1, 100, marks=pytest.mark.slow)])
def test_a_persister_that_is_killed_is_replaced_and_the_snapshot_is_not_lost(
    local: Storage, tmp_path: Path, world: int, kills: int
) -> None:
    ended = run_ranks(savers.saves_while_its_persister_is_killed, world, tmp_path, str(local), kills, 1, timeout=280)
    assert ended == [0] * world, [(tmp_path / f"rank{rank}.log").read_text() for rank in range(world)]
    assert check(local) == kills


@pytest.mark.slow
def test_a_persister_that_is_killed_while_it_uploads_to_s3(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = f"s3://{s3.new_bucket(monkeypatch)}/run"
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    program = savers.saves_while_its_persister_is_killed
    ended = run_ranks(program, 1, tmp_path, url, 20, 3, timeout=280, environ=aws)
    assert ended == [0], (tmp_path / "rank0.log").read_text()
    assert check(Storage(url)) == 20


def test_a_rank_that_waits_for_its_last_checkpoint_says_that_it_is_alive(local: Storage, tmp_path: Path) -> None:
    ended = run_ranks(savers.waits_for_a_persister_that_stands_still, 1, tmp_path, str(local))
    assert ended == [0], (tmp_path / "rank0.log").read_text()
    assert check(local) == 1


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_what_a_killed_rank_has_given_is_finished_by_its_persister(local: Storage, tmp_path: Path, kills: int) -> None:
    moments = random.Random(2)
    done = 0
    for _ in range(kills):
        ended = run_ranks(savers.saves_until_it_is_killed, 1, tmp_path, str(local), done + 1, moments.uniform(0, 0.03))
        assert ended == [-signal.SIGKILL]
        savers.wait_until_gone(tmp_path)
        done = check(local, at_least=done + 1)


def test_a_storage_that_fails_is_tried_until_it_is_back_and_the_newest_snapshot_is_kept(
    local: Storage, tmp_path: Path
) -> None:
    ended = run_ranks(savers.saves_while_the_folder_is_away, 1, tmp_path, str(local))
    assert ended == [0], (tmp_path / "rank0.log").read_text()
    assert [entry.step for entry in catalogue(local)] == [4, 1]
    assert check(local) == 4


@pytest.mark.slow
def test_a_full_disk_is_told_of_and_the_snapshot_is_written_when_there_is_room(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)]
    mounted = subprocess.run(mount, capture_output=True, text=True, timeout=30, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        folder = small / "run"
        ended = run_ranks(savers.saves_while_the_disk_is_full, 1, tmp_path, str(folder), str(small / "filler"))
        assert ended == [0], (tmp_path / "rank0.log").read_text()
        assert check(Storage(str(folder))) == 2
    finally:
        savers.wait_until_gone(tmp_path)
        subprocess.run(["umount", str(small)], check=True, timeout=30)


@pytest.mark.slow
def test_a_storage_that_fails_for_a_while_does_not_end_a_run(sandbox: Sandbox, tmp_path: Path) -> None:
    put_recipe(sandbox)
    folder = tmp_path / "saved"
    removable = savers.Removable(folder)
    closed = gate(sandbox)
    with sandbox.start(*LAUNCH, *JOB, f"checkpoint.to={folder}") as process:
        wait_at_gate(sandbox, process)
        wait_for((folder / f"step-{WAIT_AT:08d}/manifest.json").exists, what="a first checkpoint")
        removable.take_away()
        closed.unlink()
        begin = said(process, "it is kept in memory and tried again")
        removable.bring_back()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, begin + out + err
    assert "cannot be written yet (rank" in begin
    assert "cannot be written yet" not in out
    assert "checkpoints can be written again" in out
    assert newest(Storage(str(folder)))[0] == STEPS


def test_a_storage_that_works_again_is_told_of_where_what_failed_was_given_up_for_a_newer_snapshot(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nobody: Any = None
    view = PlainView()
    intake = Intake(nobody, metrics=nobody, goodput=nobody, view=view, logs=Path(), speaks=True)

    def say(kind: str, **words: Any) -> str:
        event = RankEvent("message", 0, 0, {"t": kind, **words})
        intake.take(Generation(0, 2, 2), nobody, event)
        return capsys.readouterr().out

    trouble = {"step": 30, "rank": 0, "why": "OSError: away"}
    for _ in range(2):
        assert "checkpoint of step 30 cannot be written yet (rank 0: OSError: away)" in say("trouble", **trouble)
        assert say("saved", step=20, cost={}) == ""  # was on its way
        assert say("saved", step=40, cost={}) == "checkpoints can be written again\n"


# ---- beside an agent


@contextmanager
def given(storage: Storage) -> Iterator[tuple[Channel, Persister]]:
    """A persister that was given rank 0's part of two, and lost its rank then; and the agent's end of its socket."""
    ours, theirs = socket.socketpair()
    agent = Channel(ours)
    persister = Persister(theirs)
    theirs.close()
    best = {"metric": None, "goal": "min"}
    persister.open(url=str(storage), options={}, rank=0, keep=1, best=best, lease="")
    ranks = rows(state_of(1), 2)
    mine = assign([held(shards) for shards in ranks])[0]
    plan = ImagePlan(ranks[0], mine, mine, save="feed", facts={})
    holdings = Holdings()
    holdings.refresh(ranks[0])
    stage = Stage.of_size(plan.size)
    stage.fill(plan, holdings)
    snapshot = Snapshot(1, "feed", 0, 2, plan.durable, memoryview(b""), savers.FACTS)
    persister.save(1, stage.fd, description(snapshot))
    stage.close()
    persister.close()
    try:
        shard = f"step-00000001/{shard_name(0, 2, 'feed')}"
        wait_for(lambda: storage.exists(shard), what="rank 0's shard")
        yield agent, persister
    finally:
        agent.close()
        os.waitpid(persister.pid, 0)


def test_a_part_that_is_missing_when_the_others_have_ended_is_not_waited_for(local: Storage) -> None:
    with given(local) as (agent, _):
        heard: list[Message] = []
        agent.send({"t": "alone"})
        wait_for(lambda: heard.extend(agent.receive()) or agent.closed, what="the persister's end")
        assert [message["t"] for message in heard] == ["note"]
        assert "checkpoint of step 1 not written: the other ranks have ended" in heard[0]["text"]
        assert "rank 1 has not written its part" in heard[0]["text"]
    assert catalogue(local) == []


def test_a_persister_ends_with_its_agent_whatever_it_is_doing(local: Storage) -> None:
    with given(local) as (agent, persister):
        agent.close()
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        wait_for(lambda: os.waitid(os.P_PID, persister.pid, how), what="the persister's end")


# ---- counted


def test_what_a_checkpoint_costs_is_among_the_metrics(tmp_path: Path) -> None:
    paced = ("recipe=half_recipes:Scaled", "model.paced=true")  # steps do not run away from checkpoints
    job = ("train.steps=12", "checkpoint.every=1", "train.log_every=1", "checkpoint.keep=99")
    run = train_ranks(tmp_path, 2, *MODEL, *paced, *job)
    found = [row for row in run.rows() if "checkpoint/bytes" in row]
    assert len(found) > 5  # a completed checkpoint is told of in the next row, or the one after it
    manifest = open_manifest(Storage(str(run.path / "checkpoints")), 12)
    size = sum(piece.end - piece.begin for entry in manifest.tensors.values() for piece in entry.pieces)
    for row in found:
        assert row["checkpoint/bytes"] == size
        assert 0 < row["checkpoint/stall_seconds"] < row["checkpoint/durable_seconds"] < 60


# ---- begun with another's weights


def test_the_weights_of_another_run_are_taken_under_torchrun(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = train_ranks(tmp_path / "one", 1, *MODEL, "train.steps=4")
    still = ("train.steps=1", "train.optimizer.lr=1e-30", "train.optimizer.weight_decay=0")
    second = train_ranks(tmp_path / "two", 2, *MODEL, *still, "--init-from", str(first.path / "checkpoints"))
    before, after = (newest(Storage(str(run.path / "checkpoints")))[1] for run in (first, second))
    weights = [name for name in before if name.startswith("model.") and "running" not in name]
    assert_same({name: after[name] for name in weights}, {name: before[name] for name in weights})


def test_weights_that_are_not_there_are_refused_under_torchrun(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit codes \[2\](.|\n)*no such folder"):
        train_ranks(tmp_path, 1, *MODEL, "train.steps=1", "--init-from", str(tmp_path / "gone"))
