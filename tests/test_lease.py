"""One run at a time writes to a folder of checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import make_state, rows
from dltrain.checkpoint import lease
from dltrain.checkpoint.lease import Lease, holder, of_generation, release, renew, take
from dltrain.checkpoint.reader import catalogue
from dltrain.checkpoint.saving import GivenUp, Patience, Saving, Snapshot
from dltrain.checkpoint.tensors import to_bytes
from dltrain.checkpoint.writer import assign, held, plan_shard
from dltrain.core.errors import JobError
from dltrain.core.storage import Storage
from launching import Sandbox
from savers import FACTS
from stage import JOB, STEPS, gate, put_recipe, wait_at_gate


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_READ_BACK", 0.01)


def taken(storage: Storage, run: str, *, pid: int = 0) -> tuple[str, list[str]]:
    said: list[str] = []
    return take(storage, run, pid=pid or os.getpid(), on_message=said.append, where="checkpoint.to"), said


def change(storage: Storage, **fields: object) -> None:
    found = holder(storage)
    assert found is not None
    storage.write(lease.LEASE, [found.model_copy(update=fields).model_dump_json().encode()])


def test_another_run_is_refused_with_the_holder_and_since_when(storage: Storage) -> None:
    token, said = taken(storage, "aaaa")
    assert not said
    with pytest.raises(
        JobError, match=rf"checkpoint\.to: .* is in use by run aaaa \(process {os.getpid()} on .*since 20"
    ):
        taken(storage, "bbbb")
    assert renew(storage, token) is None
    again, _ = taken(storage, "aaaa")  # the same run, which its own lock keeps to one launch
    stale = renew(storage, token)
    assert stale is not None
    assert stale.token == again
    release(storage, token)
    assert holder(storage) is not None
    release(storage, again)
    assert holder(storage) is None
    assert taken(storage, "bbbb")[0]


def test_a_run_that_is_over_gives_way_and_that_is_said(local: Storage) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    taken(local, "aaaa", pid=child.pid)
    with pytest.raises(JobError, match="in use by run aaaa"):
        taken(local, "bbbb")
    child.communicate()
    _, said = taken(local, "bbbb")
    assert "taking over" in said[0]
    assert "whose process is gone" in said[0]
    change(local, host="elsewhere", boot="another")
    with pytest.raises(JobError, match="on elsewhere"):
        taken(local, "cccc")
    found = holder(local)
    assert found is not None
    change(local, renewed=found.renewed - lease.TTL - 1)
    _, said = taken(local, "cccc")
    assert "has not been heard of for " in said[0]


@pytest.mark.parametrize("elsewhere", [{"boot": "another"}, {"namespace": "pid:[1]"}])
def test_another_machine_of_the_same_name_is_another(local: Storage, elsewhere: dict[str, str]) -> None:
    taken(local, "aaaa")
    change(local, pid=2**22 + 1, **elsewhere)  # a number that no process has here
    with pytest.raises(JobError, match="in use by run aaaa"):
        taken(local, "bbbb")


def test_an_older_generation_of_ranks_has_lost_the_lease(storage: Storage) -> None:
    token, _ = taken(storage, "aaaa")
    first, second = of_generation(token, 0), of_generation(token, 1)
    assert renew(storage, first) is None
    assert renew(storage, second) is None  # the ranks that were started again
    stale = renew(storage, first)
    assert stale is not None
    assert stale.token == second
    assert renew(storage, token) is None  # the launcher, between two starts
    assert renew(storage, first) is not None
    assert of_generation(second, 2) == of_generation(token, 2)
    release(storage, second)
    assert holder(storage) is None


def test_a_damaged_lease_protects_nothing(local: Storage) -> None:
    local.write(lease.LEASE, [b"{}"])
    token, _ = taken(local, "aaaa")
    found = holder(local)
    assert found is not None
    assert found.token == token


@pytest.mark.parametrize("first", [True, False])
def test_of_two_that_come_at_once_one_gets_it(local: Storage, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """Between the look and the write of one, another takes the lease."""
    if not first:
        taken(local, "over")
        change(local, host="elsewhere", boot="another", renewed=0.0)
    real: Callable[[Storage], Lease | None] = lease._read
    looks = 0

    def read(storage: Storage) -> Lease | None:
        nonlocal looks
        looks += 1
        found = real(storage)
        if looks == 1:
            taken(Storage(str(local)), "faster")
        return found

    monkeypatch.setattr(lease, "_read", read)
    if first:
        with pytest.raises(JobError, match="in use by run faster"):
            taken(local, "slower")
    else:
        token, _ = taken(local, "slower")  # who wrote last has it, and the other learns that when it reads back
        found = real(local)
        assert found is not None
        assert found.token == token


def test_who_has_lost_the_lease_writes_no_manifest(local: Storage) -> None:
    token, _ = taken(local, "aaaa")
    shards = rows(make_state(), 1)[0]
    plan = plan_shard(shards, assign([held(shards)])[0])
    image = memoryview(b"".join(to_bytes(shards[key.fqn].data) for key, _ in plan))

    def check() -> None:
        other = renew(local, token)
        if other is not None:
            raise GivenUp(str(other))

    def save(step: int) -> None:
        snapshot = Snapshot(step, "feed", 0, 1, tuple(plan), image, FACTS)
        Saving(local, snapshot, Patience(), on_trouble=print, before_commit=check).run()

    save(1)
    change(local, token="another", run="bbbb")
    with pytest.raises(GivenUp, match="run bbbb"):
        save(2)
    assert [entry.step for entry in catalogue(local)] == [1]


@pytest.mark.slow
def test_a_second_launch_into_one_folder_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    put_recipe(sandbox)
    to = f"checkpoint.to={tmp_path / 'shared'}"
    closed = gate(sandbox)
    with sandbox.start("launch", *JOB, to, "--run-dir", "one") as process:
        wait_at_gate(sandbox, process, ranks=1)
        second = sandbox.run("launch", *JOB, to, "--run-dir", "two")
        assert second.returncode == 2, second.stderr
        assert "checkpoint.to: " in second.stderr
        assert "is in use by run" in second.stderr
        assert not list((sandbox.folder / "two").glob("*/0001"))
        closed.unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert (tmp_path / f"shared/step-{STEPS:08d}/manifest.json").exists()
    assert not (tmp_path / "shared/lease.json").exists()
