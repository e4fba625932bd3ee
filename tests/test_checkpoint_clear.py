"""``dltrain checkpoint gc``: what goes, what stays whatever is asked, and that nothing goes unasked."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from command import Done, dltrain
from dltrain.checkpoint.lease import holder, release, take
from dltrain.checkpoint.reader import catalogue
from dltrain.checkpoint.retention import set_aside
from dltrain.core.storage import Storage
from dltrain.launcher.rundir import RunDir

from .checkpoints import flip, make_state, rows, save, shard_files, whole


def gc(source: object, *options: str) -> Done:
    return dltrain("checkpoint", "gc", str(source), *options)


def steps(storage: Storage) -> list[int]:
    return [entry.step for entry in catalogue(storage)]


def age(folder: Path, seconds: float) -> None:
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - seconds,) * 2)


def test_it_names_first_and_removes_when_told(storage: Storage) -> None:
    for step in (1, 2, 3):
        save(storage, step, whole(make_state(), 1))
    set_aside(storage, after=2)
    storage.write("step-00000009/shard-00000-of-00001.safetensors", [b"half"])
    before = storage.names()
    done = gc(storage)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("ago: it stays") == 2
    assert done.out.endswith("there is nothing to remove\n")
    done = gc(storage, "--older-than", "0", "--keep", "1")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == [
        "step-00000009",
        "step-00000003",
        "step-00000001",
        "would",
    ]
    assert storage.names() == before
    assert "removed 3 checkpoint folders" in gc(storage, "--older-than", "0", "--keep", "1", "--yes").out
    assert storage.folders() == ["step-00000002"]
    assert "nothing to remove" in gc(storage, "--keep", "1", "--yes").out
    assert storage.folders() == ["step-00000002"]


def test_a_folder_that_a_run_writes_to_is_left_alone(local: Storage) -> None:
    for step in (1, 2):
        save(local, step, whole(make_state(), 1))
    token = take(local, "another run", pid=os.getpid(), on_message=print, where="checkpoint.to")
    done = gc(local, "--keep", "1", "--yes")
    assert done.code == 2
    assert "in use by run another run" in done.err
    assert steps(local) == [2, 1]
    release(local, token)
    assert gc(local, "--keep", "1", "--yes").code == 0
    assert steps(local) == [2]
    assert holder(local) is None


def test_the_best_stays_beside_the_newest(local: Storage) -> None:
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.6)):
        save(local, step, whole(make_state(), 1), evaluated={"val/accuracy": accuracy})
    manifest = Path(str(local), "step-00000004", "manifest.json")
    written = json.loads(manifest.read_text())
    written["job"] = {"checkpoint": {"keep_best": "val/accuracy", "keep_best_goal": "max"}}
    manifest.write_text(json.dumps(written))
    done = gc(local, "--keep", "1", "--yes")
    assert "step-00000002 is the best" in done.out
    assert steps(local) == [4, 2]


def test_what_a_killed_writer_left_is_as_old_as_its_partial_file(local: Storage) -> None:
    save(local, 1, whole(make_state(), 1))
    half = Path(str(local), "step-00000002")
    half.mkdir()
    (half / ".shard-00000-of-00001.safetensors.abc.partial").write_bytes(bytes(1000))
    assert "nothing to remove" in gc(local, "--yes").out
    age(half, 3700)
    assert "removed 1 checkpoint folder, 1.0 kB" in gc(local, "--yes").out
    assert steps(local) == [1]


@pytest.mark.parametrize("damaged", [{4}, {4, 3}, {4, 3, 2, 1}])
def test_the_newest_that_is_whole_stays(local: Storage, damaged: set[int]) -> None:
    for step in (1, 2, 3, 4):
        save(local, step, rows(make_state(), 2))
        if step in damaged:
            flip(shard_files(local, step)[0])
    done = gc(local, "--keep", "1", "--yes")
    assert done.code == 0
    newest_whole = max({1, 2, 3, 4} - damaged, default=None)
    assert steps(local) == ([4, 3, 2, 1] if newest_whole is None else [4, newest_whole])
    for step in damaged:
        assert f"step-{step:08d} is damaged" in done.out


def test_a_run_in_use_is_not_touched(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "a", {"checkpoint": {"to": None, "options": {}}})
    storage = Storage(str(run.path / "checkpoints"))
    for step in (1, 2):
        save(storage, step, whole(make_state(), 1))
    for source in (run.path, storage):
        done = gc(source, "--keep", "1", "--yes")
        assert (done.code, "in use by a launch" in done.err) == (2, True)
    assert steps(storage) == [2, 1]
    assert "would remove 1 checkpoint folder," in gc(run.path, "--keep", "1").out
    run.close()
    assert gc(run.path, "--keep", "1", "--yes").code == 0
    assert steps(storage) == [2]
    again = RunDir.reopen(run.path)
    assert again is not None, "the lock is released"
    again.close()
    assert json.loads((run.path / "run.json").read_text())["name"] == "a"


def test_wrong_requests(local: Storage) -> None:
    save(local, 1, whole(make_state(), 1))
    for source, options, said in [
        (f"{local}/step-00000001", [], "this is one checkpoint"),
        (local, ["--older-than", "soon"], "'soon' is no duration"),
        (local, ["--keep", "0"], "--keep"),
    ]:
        done = gc(source, *options, "--yes")
        assert (done.code, said in done.err) == (2, True), done.err
    assert steps(local) == [1]
