"""``dltrain data``: preparing a corpus and looking at data from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DLTRAIN = str(Path(sys.executable).with_name("dltrain"))

pytestmark = pytest.mark.usefixtures("empty_folder")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("DLTRAIN_")}
    return subprocess.run([DLTRAIN, "data", *args], capture_output=True, text=True, timeout=120, env=env, check=False)


def test_a_corpus_is_prepared_and_shown() -> None:
    Path("texts").mkdir()
    for i in range(40):
        Path(f"texts/{i}.txt").write_text(f"the text number {i} " * 20, encoding="utf-8")
    done = run("prepare", "texts", "--out", "my corpus.tokens")
    assert (done.returncode, done.stderr) == (0, "")
    tokens = sum(path.stat().st_size + 1 for path in Path("texts").iterdir())
    lines = done.stdout.splitlines()
    assert lines[0] == f"wrote my corpus.tokens: 40 documents, {tokens:,} tokens as uint8, vocabulary 256"
    assert lines[-1] == "  dltrain data show 'data.source=my corpus.tokens' data.options.length=128"
    shown = run("show", "data.source=my corpus.tokens", "data.options.length=128")
    rows = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert rows["x"] == rows["y"] == "int64 [128]"
    assert rows["vocabulary"] == "256"
    assert int(rows["samples"]) == sum(int(rows[part]) for part in ("train", "val", "test")) >= tokens // 128 - 3


def test_what_is_wrong_is_said_and_ends_with_2() -> None:
    Path("a.txt").write_bytes(b"\xff")
    done = run("prepare", "a.txt", "--out", "a.tokens")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dltrain: INPUT: 'a.txt' cannot be read as text: byte 0 is not UTF-8\n"
    assert [path.name for path in Path().iterdir()] == ["a.txt"]


def test_classes_are_listed() -> None:
    Path("flowers.csv").write_text("petal,label\n" + "1,rose\n2,daisy\n3,rose\n" * 9, encoding="utf-8")
    done = run("show", "data.source=flowers.csv", "data.split.train=1", "data.split.val=0", "data.split.test=0")
    assert done.stdout.splitlines() == [
        "source   flowers.csv",
        "samples  27",
        "train    27",
        "val      0",
        "test     0",
        "x        float32 [1]",
        "y        int64 []",
        "classes  2: 0 daisy, 1 rose",
    ]
    wrong = run("show", "data.source=flowers.csv", "data.options.y=colour")
    assert wrong.returncode == 2
    assert "data.options.y: there is no column 'colour'" in wrong.stderr
