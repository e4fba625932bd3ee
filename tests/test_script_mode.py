"""A script under ``dltrain launch`` finds what it finds under ``torchrun``, and leaves the same behind.

The differences that are meant are listed here and in docs/torchrun.md; any other fails.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from launching import Sandbox

PROGRAMS = Path(__file__).parent / "programs"

LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--log-dir", "elastic"],
    "fork": ["dltrain", "launch"],
    "spawn": ["dltrain", "launch", "--start-method", "spawn"],
}

#: What differs on purpose: docs/torchrun.md says why.
MEANT = {
    "at start/environ/GLOO_SOCKET_IFNAME",
    "at start/environ/MASTER_ADDR",
    "at start/environ/MASTER_PORT",
    "at start/environ/NCCL_SOCKET_IFNAME",
    "at start/environ/TORCHELASTIC_ERROR_FILE",
    "at start/environ/TORCHELASTIC_RUN_ID",
    "at start/environ/TORCHELASTIC_SIGNALS_TO_HANDLE",
    "hash",
    "interpreter/flags/safe_path",
}
#: What a fork of a process that has imported torch cannot take back.
PRELOADED = {"at start/warning filters"}


def flatten(facts: Any, path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by paths such as ``main/names``."""
    if not isinstance(facts, dict):
        return {path: facts}
    found: dict[str, Any] = {}
    for key, value in facts.items():
        found |= flatten(value, f"{path}/{key}" if path else key)
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    absent = object()
    names = one.keys() | other.keys()
    return {k: (one.get(k), other.get(k)) for k in names if one.get(k, absent) != other.get(k, absent)}


@pytest.mark.slow
def test_a_script_finds_torchruns_surroundings_and_leaves_the_same_behind(sandbox: Sandbox) -> None:
    """One program run by torchrun, in forks, and in fresh interpreters. It looks at everything that it can see."""
    shutil.copy(PROGRAMS / "surroundings.py", sandbox.folder / "train.py")
    facts = {name: run_surroundings(sandbox, name) for name in LAUNCHERS}
    for name in ("fork", "spawn"):
        for theirs, ours in zip(facts["torchrun"], facts[name], strict=True):
            check_descriptors(theirs["descriptors"], ours["descriptors"])
            found = differences(flatten(comparable(theirs)), flatten(comparable(ours)))
            assert found.keys() == MEANT | (PRELOADED if name == "fork" else set()), (name, found)


def comparable(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in ("descriptors", "random")}


def check_descriptors(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Standard streams as torchrun's, to a file each; beside them a socket and two pages, none of them inherited."""
    assert theirs.keys() == {"0", "1", "2"}
    assert [Path(ours[fd][0]).name for fd in "012"] == ["null", "stdout.log", "stderr.log"]
    opened = [entry for fd, entry in ours.items() if fd not in theirs]
    assert sorted(link.partition(":")[0] for link, _ in opened) == ["/memfd", "/memfd", "socket"]
    assert not any(inherited for _, inherited in opened)


def run_surroundings(sandbox: Sandbox, launcher: str) -> list[dict[str, Any]]:
    """Have the program run by both ranks, check what it left behind, and give what each found."""
    out = sandbox.folder / "out"
    out.mkdir()
    command, *options = LAUNCHERS[launcher]
    options += ["--nproc-per-node", "2", "train.py", "out"]
    done = sandbox.run(*options, command=command, OMP_NUM_THREADS="1", LC_ALL="C.UTF-8")
    assert done.returncode == 0, done.stderr
    printed = re.findall("a line|past the stream|half a line", done.stdout)
    assert sorted(printed) == sorted(["a line", "past the stream", "half a line"] * 2)
    assert done.stderr.count("an umlaut: ü, and what is no text: \\udcff\n") == 2, done.stderr
    for rank in (0, 1):
        left = out / f"rank{rank}"
        said = {name: (left / name).read_text() for name in ("atexit", "finalize", "thread", "open", "destructor")}
        assert said == {
            "atexit": "called",
            "finalize": "called",
            "thread": "ran on",
            "open": "never flushed",
            "destructor": "destroyed",
        }
        assert zipfile.ZipFile(left / "archive.zip").read("name") == b"content"
        assert not list(left.glob("scratch*"))
    facts = [json.loads((out / f"rank{rank}/facts.json").read_text()) for rank in (0, 1)]
    assert all(facts[0]["random"][name] != facts[1]["random"][name] for name in facts[0]["random"])
    shutil.rmtree(out)
    return facts
