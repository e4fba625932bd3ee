"""TensorBoard files written from the journal, read back with TensorBoard's own reader."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from dltrain.core.errors import JobError
from dltrain.tracking import tensorboard
from dltrain.tracking.journal import Journal, Row
from dltrain.tracking.tensorboard import TensorBoardPump
from launching import wait_for

pytestmark = pytest.mark.skipif(not tensorboard.available(), reason="the package tensorboard is not installed")


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_numbers_arrive_once_also_after_a_resume(tmp_path: Path) -> None:
    said: list[str] = []
    journal = Journal(tmp_path / "m")
    pump = TensorBoardPump(journal.path, tmp_path, on_message=said.append)
    journal.extend(Row(step, 1.7e9 + step, {"train/loss": step / 4, "ok": True, "note": "text"}) for step in range(50))
    outcome = pump.finish(60)
    assert (outcome.state, outcome.rows) == ("complete", 50)
    assert str(tmp_path / "tensorboard") in outcome.command
    pump = TensorBoardPump(journal.path, tmp_path, on_message=said.append)
    journal.append(60, {"train/loss": math.inf})
    assert pump.finish(60).rows == 51
    journal.close()
    read = scalars(tmp_path)
    assert read["train/loss"] == [(step, step / 4) for step in range(50)] + [(60, math.inf)]
    assert read["ok"][0] == (0, 1.0)
    assert "note" not in read
    assert sum(file.stat().st_size > 0 for file in (tmp_path / "tensorboard").iterdir()) == 1
    assert said == []


def test_a_reader_that_was_there_before_the_resume_sees_no_step_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal(tmp_path / "m")
    journal.extend(Row(step, 1.7e9, {"loss": 1.0}) for step in range(10))
    assert TensorBoardPump(journal.path, tmp_path, on_message=print).finish(60).state == "complete"
    reader = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    journal.append(10, {"loss": 1.0})
    assert TensorBoardPump(journal.path, tmp_path, on_message=print).finish(60).state == "complete"
    journal.close()
    assert [event.step for event in reader.Reload().Scalars("loss")] == list(range(11))


def test_a_folder_that_cannot_be_written_is_told_once_and_tried_again(tmp_path: Path) -> None:
    said: list[str] = []
    journal = Journal(tmp_path / "m")
    journal.append(0, {"loss": 1.0})
    journal.close()
    (tmp_path / "tensorboard").write_text("in the way")
    pump = TensorBoardPump(journal.path, tmp_path, on_message=said.append, pause=0.05)
    wait_for(lambda: said, what="the trouble")
    (tmp_path / "tensorboard").unlink()
    wait_for(lambda: list(tmp_path.glob("tensorboard/events*")), what="the file")
    assert pump.finish(60).state == "complete"
    assert scalars(tmp_path)["loss"] == [(0, 1.0)]
    assert len(said) == 1


def test_without_the_package_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    sys.path_importer_cache.clear()
    with pytest.raises(JobError, match=r"dltrain\[tensorboard\]"):
        TensorBoardPump(tmp_path / "m", tmp_path, on_message=print)
