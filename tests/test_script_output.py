"""What the terminal shows of what ranks print, and when."""

from __future__ import annotations

import os
import select
import time

import pytest
from dltrain.core.rows import RunRow
from dltrain.launcher.view import OutputRules, PlainView, ScriptView
from launching import Sandbox

PROGRAM = """
import pathlib, time
print("10%\\r20%\\rfinish?", end="")
while not pathlib.Path("go").exists():
    time.sleep(0.01)
print(" yes", end="")
"""


def test_an_unfinished_line_is_seen_while_the_script_waits(sandbox: Sandbox) -> None:
    (sandbox.folder / "train.py").write_text(PROGRAM, encoding="utf-8")
    with sandbox.start("launch", "train.py") as process:
        assert process.stdout is not None
        seen, deadline = b"", time.monotonic() + 120
        while seen != b"10%\r20%\rfinish?":
            ready = select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, seen
            seen += os.read(process.stdout.fileno(), 100)
        (sandbox.folder / "go").touch()
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, " yes", "")


def test_lines_of_several_ranks_do_not_mix(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dltrain.launcher.view._UNFINISHED", 3600.0)  # nothing here is old enough to be shown
    view = ScriptView(OutputRules(), quiet=False)
    view.output(0, "stdout", b"a\nhal")
    view.output(1, "stdout", b"b\n")
    view.output(0, "stdout", b"f\n\n5%\r6%")
    view.beats(0, [])
    assert capfdbinary.readouterr().out == b"a\nb\nhalf\n\n5%"
    view.close()
    assert capfdbinary.readouterr().out == b"\r6%"


def test_a_prefix_stands_before_every_line_and_only_there(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    view = ScriptView(OutputRules(tee=3), quiet=False)
    view.output(0, "stdout", b"a\n\n5%\r6%")
    view.output(1, "stderr", b"b\n")
    view.output(0, "stdout", b"\nc")
    view.close()
    out, err = capfdbinary.readouterr()
    assert (out, err) == (b"[default0]:a\n[default0]:\n[default0]:5%\r6%\n[default0]:c", b"[default1]:b\n")


def test_a_line_in_progress_is_seen_however_steadily_it_grows(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    view = ScriptView(OutputRules(), quiet=False)
    seen, deadline = b"", time.monotonic() + 60
    while not seen:
        assert time.monotonic() < deadline
        view.output(0, "stdout", b".")
        view.beats(0, [])
        seen = capfdbinary.readouterr().out
    assert set(seen) == set(b".")


def test_a_jobs_ranks_are_shown_by_lines_whatever_pieces_they_come_in(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    for rank, piece in ((0, b"a"), (1, b"b\nc"), (0, b"\n\xc3"), (0, b"\xa4\n\n"), (0, b"end")):
        view.output(rank, "stdout", piece)
    assert capsys.readouterr().out == "[rank 1] b\n[rank 0] a\n[rank 0] ä\n[rank 0] \n"
    view.close()
    assert sorted(capsys.readouterr().out.splitlines()) == ["[rank 0] end", "[rank 1] c"]


def test_ranks_counted_by_cores_see_no_gpu(sandbox: Sandbox) -> None:
    (sandbox.folder / "gpus.py").write_text("import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))\n")
    done = sandbox.run("launch", "--nproc-per-node", "cpu", "gpus.py", CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {"''"}


def test_the_time_to_go_does_not_count_what_a_restart_took(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    facts = {"samples": {}, "parameters": 1, "total_steps": 100}

    def said(step: int, at: float) -> str:
        view.row(RunRow(step, at, {"val/loss": 1.0}, 1, 0.0, 0.0))
        return capsys.readouterr().out

    view.setup({**facts, "start": 0})
    assert "to go" not in said(1, 1000.0)
    assert "1 min 30 s to go" in said(10, 1009.0)
    view.setup({**facts, "start": 5})
    assert "1 min 34 s to go" in said(6, 1300.0)  # at the pace from before
    assert "1 min 30 s to go" in said(10, 1304.0)
