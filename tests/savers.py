"""Programs for ``run_ranks`` that save one snapshot after the other while something kills them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from checkpoints import make_state, rows
from dltrain.checkpoint.saving import GivenUp, Patience, Saving, Snapshot
from dltrain.checkpoint.tensors import to_bytes
from dltrain.checkpoint.writer import assign, held, plan_shard
from dltrain.core.contracts import Engine, ShardedState
from dltrain.core.folders import Chunk
from dltrain.core.job import Job
from dltrain.core.processes import Process
from dltrain.core.storage import Storage
from dltrain.training.context import context
from dltrain.training.memory import Memory, Position
from dltrain.training.persistence import Persister
from dltrain.training.reporter import Reporter
from dltrain.training.snapshot import Snapshots
from launching import wait_for
from torch import Tensor

BIG = 200_000
FACTS: dict[str, Any] = {"total_steps": 100, "samples": 0, "job": {}, "extra": {}}


class Silent(Reporter):
    """Keeps what it is told in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[dict[str, Any]] = []

    def sync(self) -> None: ...

    def unsettled(self) -> int:
        return 0

    def recent(self) -> tuple[int, bytes]:
        return 0, b"[]"

    def delivered(self) -> bool:
        return True

    def send(self, kind: str, **data: Any) -> None:
        self.said.append({"t": kind, **data})

    def image(self, step: int, name: str, png: bytes) -> None: ...

    def close(self, timeout: float) -> None: ...


class Holder:
    """What :class:`Snapshots` needs of an engine: this rank's rows of the state of a step."""

    def __init__(self, step: int) -> None:
        self._state = rows(state_of(step), int(os.environ["WORLD_SIZE"]))[int(os.environ["RANK"])]

    def state(self) -> ShardedState:
        return self._state


def state_of(step: int) -> dict[str, Tensor]:
    """The awkward tensors, and one that takes a while to write."""
    import torch

    return {**make_state(step), "model.net.big": torch.full((BIG,), step, dtype=torch.float64)}


def open_snapshots(url: str) -> tuple[Snapshots, Persister, Silent]:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    reporter, persister = Silent(), Persister()
    if world > 1:
        dist.init_process_group("gloo")
    persister.open(url=url, options={}, rank=rank, keep=2, best={"metric": None, "goal": "min"}, lease="")
    memory = Memory(Job.model_validate({}), context(), hold=None)
    return Snapshots(persister, memory, rank=rank, world=world, reporter=reporter), persister, reporter


def take(snapshots: Snapshots, step: int) -> None:
    snapshots.save(cast(Engine, Holder(step)), Position(step, step, 1000, {}), {})


def saves_while_its_persister_is_killed(url: str, kills: int, seed: int) -> int:
    """Save ``kills`` steps; at a random moment of each the persister of one rank, in turn, dies.

    The first of a rank stands still before, so that however fast it is it dies with a snapshot.
    """
    snapshots, persister, reporter = open_snapshots(url)
    moments, world, rank = random.Random(seed), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for step in range(1, kills + 1):
        mine = step % world == rank
        if mine and step <= world:
            stop(persister)
        take(snapshots, step)
        time.sleep(moments.uniform(0, 0.02))
        if mine:
            os.kill(persister.pid, signal.SIGKILL)
        snapshots.finish(60)
    lost = [message for message in reporter.said if "was lost" in message.get("text", "")]
    assert lost, reporter.said
    return 0


def stop(persister: Persister) -> None:
    """Have it stand still; returns when it does."""
    process = Process.of(persister.pid)
    assert process is not None
    process.signal(signal.SIGSTOP)
    wait_for(lambda: process.state == "T", what="the stop")


def waits_for_a_persister_that_stands_still(url: str) -> int:
    """Save one step; the persister goes on once the rank has said three times that it is alive."""
    snapshots, persister, _ = open_snapshots(url)
    stop(persister)
    take(snapshots, 1)
    said: list[None] = []

    def alive() -> None:
        said.append(None)
        if len(said) == 3:
            os.kill(persister.pid, signal.SIGCONT)

    snapshots.finish(60, alive=alive)
    return 0


def saves_until_it_is_killed(url: str, first: int, after: float) -> int:
    """Save step after step, and be gone ``after`` seconds after the first has been given."""
    snapshots, _, _ = open_snapshots(url)
    step, end = first, None
    while True:
        take(snapshots, step)
        end = end or time.monotonic() + after
        if time.monotonic() > end:
            os.kill(os.getpid(), signal.SIGKILL)
        step += 1


class Dying(Storage):
    """Kills its process before the ``at``-th thing it is to do: a change of the storage, or a chunk of a file."""

    def __init__(self, url: str, at: int) -> None:
        super().__init__(url)
        self._left = at

    def _tick(self) -> None:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, name: str, chunks: Iterable[Chunk]) -> None:
        def ticking() -> Iterable[Chunk]:
            for chunk in chunks:
                self._tick()
                yield chunk
            self._tick()

        super().write(name, ticking())
        self._tick()

    def remove(self, name: str) -> None:
        self._tick()
        super().remove(name)


def dies_at(url: str, step: int, at: int) -> int:
    """Save one step as two ranks, one after the other, and be killed before the ``at``-th change of the storage."""
    storage = Dying(url, at)
    ranks = rows(state_of(step), 2)
    shares = assign([held(shards) for shards in ranks])
    for rank in (1, 0):
        plan = plan_shard(ranks[rank], shares[rank])
        data = {key: next(b.data for b in ranks[rank][key.fqn].boxes() if b.offset == key.offset) for key, _ in plan}
        image = memoryview(b"".join(to_bytes(data[key]) for key, _ in plan))
        facts = FACTS if rank == 0 else None
        snapshot = Snapshot(step, "feed", rank, 2, tuple(plan), image, facts)
        Saving(storage, snapshot, Patience(), on_trouble=print, before_commit=lambda: None).run()
    return 0


def wait_until_gone(folder: Path, timeout: float = 60) -> None:
    """Wait until no process works in ``folder``: a persister has its name a little later than its life."""
    deadline = time.monotonic() + timeout
    while any(_works_in(entry, folder) for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
        if time.monotonic() > deadline:
            raise GivenUp(f"somebody is still in {folder} after {timeout:g} s")
        time.sleep(0.01)


def _works_in(entry: Path, folder: Path) -> bool:
    try:
        return (entry / "cwd").resolve() == folder.resolve()
    except OSError:
        return False


class Removable:
    """A folder, as a link to one, which a file takes the place of and back: each at once, whoever is writing."""

    def __init__(self, path: Path) -> None:
        self._path, self._folder = path, Path(f"{path}-elsewhere")
        self._folder.mkdir()
        path.symlink_to(self._folder)

    def take_away(self) -> None:
        new = Path(f"{self._path}-new")
        new.touch()
        new.replace(self._path)

    def bring_back(self) -> None:
        new = Path(f"{self._path}-new")
        new.symlink_to(self._folder)
        new.replace(self._path)


def saves_while_the_folder_is_away(url: str) -> int:
    """Save step 1; take steps 2 to 4 while a file stands where the folder was; the last is saved when it is back."""
    folder = Removable(Path(url))
    snapshots, _, reporter = open_snapshots(url)
    take(snapshots, 1)
    snapshots.finish(60)
    folder.take_away()

    def told() -> list[str]:
        return [message["why"] for message in reporter.said if message["t"] == "trouble"]

    for step in (2, 3, 4):
        take(snapshots, step)
        deadline = time.monotonic() + 60
        while len(told()) < step - 1 and time.monotonic() < deadline:
            snapshots.poll()
            time.sleep(0.01)
    folder.bring_back()
    snapshots.finish(60)
    assert len(told()) == 4, told()  # a word for each that could not be written, one when it could
    assert all("NotADirectoryError" in why or "File exists" in why for why in told()[:-1]), told()
    assert told()[-1] == ""
    figures = snapshots.figures()
    assert figures["checkpoint/skipped"] == 2, figures  # those of steps 2 and 3
    assert figures["checkpoint/bytes"] > 8 * BIG, figures
    assert snapshots.figures() == {}
    return 0


def saves_while_the_disk_is_full(url: str, filler: str) -> int:
    """Save step 1; take step 2 with no room for it, which is made when that has been told."""
    snapshots, _, reporter = open_snapshots(url)
    take(snapshots, 1)
    snapshots.finish(60)
    Path(filler).write_bytes(bytes(shutil.disk_usage(url).free - (64 << 10)))
    take(snapshots, 2)
    deadline = time.monotonic() + 60
    while not any(message["t"] == "trouble" for message in reporter.said) and time.monotonic() < deadline:
        snapshots.poll()
        time.sleep(0.01)
    Path(filler).unlink()
    snapshots.finish(60)
    whys = [message["why"] for message in reporter.said if message["t"] == "trouble"]
    assert "No space left on device" in whys[0], whys
    return 0
