"""The metrics file: each step once, strict JSON, whole after a crash, patient with a full disk."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dltrain.tracking.journal import Journal, Row, Tail, read_rows
from hypothesis import given, settings
from hypothesis import strategies as st


def strict(line: str) -> dict[str, object]:
    def refuse(token: str) -> float:
        raise ValueError(f"{token} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    metrics = {"train/loss": 0.25, "n": 3, "note": "naïve\n<b>", "ok": True, "": 1e-300}
    assert journal.append(4, metrics, time=1.7e9)
    journal.close()
    assert list(read_rows(tmp_path / "metrics.jsonl")) == [Row(4, 1.7e9, metrics)]
    assert strict((tmp_path / "metrics.jsonl").read_text())["step"] == 4


def test_every_line_is_strict_json_and_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m")
    journal.append(0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    journal.close()
    assert strict((tmp_path / "m").read_text())["a"] == "NaN"
    (row,) = read_rows(tmp_path / "m")
    assert math.isnan(row.metrics["a"])  # pyright: ignore[reportArgumentType]
    assert (row.metrics["b"], row.metrics["c"], row.metrics["d"]) == (math.inf, -math.inf, 1.0)


def test_values_that_are_no_scalars_do_not_end_the_run(tmp_path: Path) -> None:
    import numpy as np

    journal = Journal(tmp_path / "m")
    journal.append(0, {"np": np.float32(0.5), "list": [1], "none": None, "nan": np.float32("nan"), 7: 1})  # pyright: ignore
    journal.close()
    (row,) = read_rows(tmp_path / "m")
    assert (row.metrics["np"], row.metrics["list"], row.metrics["none"], row.metrics["7"]) == (0.5, "[1]", "None", 1)


def test_the_first_row_of_a_step_wins_also_after_reopening(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m")
    assert journal.last_step == -1
    assert journal.extend(Row(step, 0.0, {"v": step}) for step in (0, 1, 2)) == 3
    assert not journal.append(1, {"v": "again"})
    journal.close()
    journal = Journal(tmp_path / "m")
    assert journal.last_step == 2
    assert journal.extend(Row(step, 0.0, {"v": step}) for step in (1, 2, 3, 4)) == 2
    assert journal.replayed == 2
    journal.close()
    assert [(row.step, row.metrics["v"]) for row in read_rows(tmp_path / "m")] == [(s, s) for s in range(5)]


def test_reserved_names_are_left_out_with_a_word(tmp_path: Path) -> None:
    said: list[str] = []
    journal = Journal(tmp_path / "m", on_message=said.append)
    for step in (3, 4):
        journal.append(step, {"step": 99, "loss": 1.0}, time=5.0)
    journal.close()
    assert [row.step for row in read_rows(tmp_path / "m")] == [3, 4]
    assert len(said) == 1
    assert "'step'" in said[0]


@settings(max_examples=60, deadline=None)
@given(
    cut=st.integers(0, 200), junk=st.sampled_from([b"", b"\0\0\0", b"\n", b'{"step":', b"null\n", b"\0\0\n", b"[1]\n"])
)
def test_whatever_a_crash_leaves_at_the_end_the_whole_rows_stay(
    cut: int, junk: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "m"
    journal = Journal(path)
    journal.extend(Row(step, 1.0, {"loss": 0.5}) for step in range(5))
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    torn = b"".join(lines)[:cut]
    path.write_bytes(torn + junk)
    whole = torn.count(b"\n") + (junk == b"\n" and any(torn.endswith(line[:-1]) for line in lines))
    journal = Journal(path, on_message=lambda text: None)
    assert journal.last_step == whole - 1
    assert journal.append(100, {"loss": 1.0})
    journal.close()
    assert [row.step for row in read_rows(path)] == [*range(whole), 100]


def test_a_writer_killed_at_any_moment_leaves_a_file_to_go_on_with(tmp_path: Path) -> None:
    program = (
        "import sys; from dltrain.tracking.journal import Journal\n"
        "journal = Journal(sys.argv[1]); step = journal.last_step\n"
        "while True:\n    step += 1; journal.append(step, {'v': step}); journal.flush(min_interval=0.01)\n"
    )
    path = tmp_path / "m"
    size = reached = 0
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
        try:
            deadline = time.monotonic() + 60
            while not path.exists() or path.stat().st_size < size + 100_000:
                assert writer.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.002)
        finally:
            writer.kill()
            writer.wait()
        rows = list(read_rows(path))
        assert [row.step for row in rows] == list(range(len(rows)))
        assert len(rows) > reached
        size, reached = path.stat().st_size, len(rows)


def test_a_tail_sees_each_whole_row_once(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "m")
    assert tail.read() == []
    (tmp_path / "m").write_bytes(b'{"step":0,"time":1}\n\0\0garbage\n{"step":1,"time":1}\n{"step":2,"ti')
    assert [row.step for row in tail.read()] == [0, 1]
    assert tail.read() == []
    with (tmp_path / "m").open("ab") as file:
        file.write(b'me":1}\nnull\n')
    assert [row.step for row in tail.read()] == [2]
    assert tail.read() == []


def test_reading_takes_bounded_bites(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m")
    journal.extend(Row(step, 1.0, {"v": 0.5}) for step in range(10_000))
    journal.close()
    tail = Tail(tmp_path / "m")
    bites = []
    while rows := tail.read(limit=4096):
        bites.append(len(rows))
    assert sum(bites) == 10_000
    assert max(bites) < 200


def test_fsync_is_rationed_only_when_asked(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m")
    journal.append(0, {})
    assert journal.flush()
    journal.append(1, {})
    assert not journal.flush(min_interval=60)
    assert journal.flush()
    assert journal.flush(min_interval=60)
    journal.close()
    journal.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"this machine mounts no tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_costs_no_row_once_there_is_room_again(small_disk: Path) -> None:
    said: list[str] = []
    hog = small_disk / "hog"
    hog.write_bytes(bytes(48 << 10))
    journal = Journal(small_disk / "m", on_message=said.append)
    for step in range(1000):
        assert journal.append(step, {"loss": step / 7})
    assert not journal.flush()
    assert len(said) == 1
    assert "disk is full" in said[0]
    before = list(read_rows(small_disk / "m"))
    assert [row.step for row in before] == list(range(len(before)))
    assert 0 < len(before) < 1000
    hog.unlink()
    assert journal.append(1000, {"loss": 0.0})
    assert journal.flush()
    journal.close()
    assert [row.step for row in read_rows(small_disk / "m")] == list(range(1001))
    assert len(said) == 2
    assert "again" in said[1]


def test_a_disk_that_stays_full_bounds_the_memory(small_disk: Path) -> None:
    said: list[str] = []
    (small_disk / "hog").write_bytes(bytes(60 << 10))
    journal = Journal(small_disk / "m", on_message=said.append, limit=10_000)
    taken = journal.extend(Row(step, 1.0, {"loss": 0.5}) for step in range(2000))
    assert 0 < taken < 2000
    assert journal.lost == 2000 - taken
    assert journal.last_step == taken - 1, "a row that was left out may come again in a replay"
    (small_disk / "hog").unlink()
    assert journal.append(2000, {})
    journal.close()
    assert [row.step for row in read_rows(small_disk / "m")] == [*range(taken), 2000]
