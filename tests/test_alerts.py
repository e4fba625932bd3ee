"""Failures as alerts in W&B: each once, however often their sender is started again; and what a run came to."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from dltrain.core.job import WandbSpec
from dltrain.tracking.alerts import FILE, alerts, raise_alert
from dltrain.tracking.journal import Journal
from dltrain.tracking.wandb import WandbPump
from launching import wait_for

from .wandb_server import StandIn

RUN = "run-1"


@pytest.fixture(autouse=True)
def private_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="test-") as scratch:  # short, as a socket's path is
        monkeypatch.setattr(tempfile, "tempdir", scratch)
        monkeypatch.setenv("TMPDIR", scratch)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        yield


def feeds(folder: Path) -> list[int]:
    """The processes that feed the run in ``folder``."""
    word = os.fsencode(folder / "wandb" / "feed.json")
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if word in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def pump_of(folder: Path, mode: str) -> WandbPump:
    spec = WandbSpec.model_validate({"mode": mode})
    return WandbPump(
        folder / "metrics.jsonl",
        folder,
        spec,
        run_id=RUN,
        name="digits",
        config={},
        on_message=print,
        server_timeout=20,
        upload_interval=1,
        pause=0.2,
    )


def test_each_alert_is_sent_once_though_its_sender_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StandIn() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        pump = pump_of(tmp_path, "online")
        journal = Journal(tmp_path / "metrics.jsonl")
        journal.append(0, {"train/loss": 1.0})
        journal.flush()
        raise_alert(tmp_path, "A failure", "rank 1 was killed", "WARN")
        wait_for(lambda: RUN in server.runs and server.runs[RUN].alerts, what="the alert")
        wait_for((tmp_path / "wandb/alerts-sent").exists, what="the note that it was sent")
        senders = feeds(tmp_path)
        assert senders
        for pid in senders:
            os.kill(pid, signal.SIGKILL)
        raise_alert(tmp_path, "The run failed", "rank 1 was killed again", "ERROR")
        (tmp_path / "summary.json").write_text(json.dumps({"goodput": 0.75}))
        journal.close()
        outcome = pump.finish(60, failed=True)
        assert outcome.state == "complete", outcome
        assert server.runs[RUN].alerts == [("A failure", "WARN"), ("The run failed", "ERROR")]
        assert server.runs[RUN].summary["goodput"] == 0.75


def test_an_offline_run_keeps_alerts_also_one_before_the_first_row(tmp_path: Path) -> None:
    raise_alert(tmp_path, "The run failed", "nothing was ever logged", "ERROR")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"title": "cut o')
    assert [alert.title for alert in alerts(tmp_path)] == ["The run failed"]
    outcome = pump_of(tmp_path, "offline").finish(60, failed=True)
    assert outcome.state == "offline", outcome
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert log.read_bytes().count(b"nothing was ever logged") == 1
