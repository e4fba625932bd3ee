"""W&B fed from the journal: the real client against a stand-in server, through everything that can go wrong."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dltrain.core.job import WandbSpec
from dltrain.tracking.journal import Journal, Row
from dltrain.tracking.wandb import Outcome, WandbPump
from launching import wait_for

from .wandb_files import offline_rows
from .wandb_server import Fault, StandIn

KEY = "0123456789abcdef" * 2 + "01234567"
RUN = "run-1"

# What a controller does with a pump. Each line on stdin is a number of steps to have logged, or "finish SECONDS".
CONTROLLER = """
import json, signal, sys
from dataclasses import asdict
from pathlib import Path
from dltrain.core.job import WandbSpec
from dltrain.tracking.journal import Journal
from dltrain.tracking.wandb import WandbPump

signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
folder, mode, replay_from = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
journal = Journal(folder / "metrics.jsonl")
pump = WandbPump(journal.path, folder, WandbSpec(mode=mode), run_id="run-1", name="digits", config={"lr": 0.1},
                 on_message=lambda text: print(text, file=sys.stderr), server_timeout=5, upload_interval=1, pause=0.2)
step = replay_from
for line in sys.stdin:
    if line.startswith("finish"):
        print(json.dumps(asdict(pump.finish(float(line.split()[1])))), flush=True)
    else:
        while step < int(line):
            journal.append(step, {"train/loss": step / 7})
            step += 1
        journal.flush()
assert "wandb" not in sys.modules, "wandb belongs into a process of its own"
"""


@pytest.fixture(autouse=True)
def private_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    # A socket's path is short, and so must be the folder for temporary files that holds it.
    scratch = tempfile.mkdtemp(prefix="test-")
    monkeypatch.setattr(tempfile, "tempdir", scratch)
    monkeypatch.setenv("TMPDIR", scratch)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "config"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    left = list(Path(scratch).iterdir())
    shutil.rmtree(scratch)
    assert not left, "no temporary file of a pump outlives it"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with StandIn() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "run"
    folder.mkdir()
    yield folder
    try:
        wait_until_gone(folder)
    finally:
        for pid in processes_of(folder):
            os.kill(pid, signal.SIGKILL)


def processes_of(run_dir: Path) -> dict[int, str]:
    """The processes that were told of ``run_dir``, by pid: wandb-core has it in its environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            stat = (process / "stat").read_text()
        except OSError:
            continue
        name, _, rest = stat.partition("(")[2].rpartition(")")
        if os.fsencode(run_dir / "wandb") in told and rest.split()[0] != "Z":
            found[int(process.name)] = name
    return found


def wait_until_gone(run_dir: Path) -> None:
    """No process of a pump outlives it, but a killed one that ran in the gaps needs one to end in."""
    wait_for(lambda: not processes_of(run_dir), what="the end of a pump's processes", timeout=60)


class Controller:
    """A controller in a process of its own, in a process group of its own as a shell would start it."""

    def __init__(self, run_dir: Path, mode: str, *, replay_from: int = 0) -> None:
        arguments = [sys.executable, "-c", CONTROLLER, str(run_dir), mode, str(replay_from)]
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )

    def say(self, line: object) -> None:
        stdin = self.process.stdin
        assert stdin
        stdin.write(f"{line}\n")
        stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def finish(self, timeout: float) -> dict[str, Any]:
        self.say(f"finish {timeout}")
        outcome = json.loads(self.hear())
        self.process.communicate()
        assert self.process.returncode == 0
        return outcome

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Pumped:
    """A pump in this process, and its journal."""

    def __init__(self, run_dir: Path, mode: Any = "online", *, steps: int = 5, server_timeout: float = 30) -> None:
        self.said: list[str] = []
        self.journal = Journal(run_dir / "metrics.jsonl", on_message=self.said.append)
        self.pump = WandbPump(
            self.journal.path,
            run_dir,
            WandbSpec(mode=mode, tags=["a"]),
            run_id=RUN,
            name="digits 1",
            config={"lr": 0.1},
            on_message=self.said.append,
            server_timeout=server_timeout,
            upload_interval=1,
            pause=0.2,
        )
        self.journal.extend(Row(step, 1.7e9 + step, {"train/loss": step / 7}) for step in range(steps))

    def finish(self, timeout: float, *, failed: bool = False) -> tuple[Outcome, float]:
        self.journal.close()
        start = time.monotonic()
        outcome = self.pump.finish(timeout, failed=failed)
        return outcome, time.monotonic() - start


@pytest.fixture(scope="session")
def record_type() -> Any:
    """The message that ``.wandb`` files hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        return importlib.import_module("wandb.proto.wandb_internal_pb2").Record


def test_every_step_arrives_with_its_values(run_dir: Path, server: StandIn) -> None:
    pumped = Pumped(run_dir, steps=0)
    pumped.journal.append(3, {"train/loss": float("nan"), "note": "x", "best": True}, time=1.7e9)
    pumped.journal.append(7, {"test/accuracy": 0.5})
    outcome, seconds = pumped.finish(120, failed=True)
    assert (outcome.state, outcome.rows, pumped.said) == ("complete", 2, [])
    assert outcome.url == f"{server.url}/{server.entity}/dltrain/runs/{RUN}"
    first, second = server.history(RUN)
    assert (first["_step"], first["note"], first["best"], first["_timestamp"]) == (3, "x", True, 1.7e9)
    assert first["train/loss"] != first["train/loss"], "NaN stays NaN"
    assert (second["_step"], second["test/accuracy"]) == (7, 0.5)
    run = server.runs[RUN]
    assert (run.display_name, run.exit_code, run.summary["test/accuracy"]) == ("digits 1", 1, 0.5)
    assert json.loads(run.config)["lr"] == {"value": 0.1}
    assert not list((run_dir.parent / "home").rglob("*")), "wandb writes nowhere but into the run"
    assert seconds < 60
    assert pumped.pump.finish(120) == outcome


def test_exactly_once_over_kills_of_the_controller_and_an_outage(run_dir: Path, server: StandIn) -> None:
    controller = Controller(run_dir, "online")
    controller.say(100)
    wait_for(lambda: len(server.steps(RUN)) == 100, what="the first hundred steps")
    controller.say(150)
    controller.kill()
    wait_until_gone(run_dir)

    controller = Controller(run_dir, "online", replay_from=80)
    controller.say(200)
    wait_for(lambda: len(server.steps(RUN)) == 200, what="two hundred steps")
    server.stop()
    controller.say(250)
    controller.kill()
    wait_until_gone(run_dir)

    controller = Controller(run_dir, "online", replay_from=200)
    controller.say(300)
    wait_for(lambda: "wandb-core" in processes_of(run_dir).values(), what="an attempt while the server is away")
    server.start()
    outcome = controller.finish(120)
    assert (outcome["state"], outcome["rows"]) == ("complete", 300)
    assert server.steps(RUN) == list(range(300))
    assert not server.overwritten


def test_rows_that_the_server_refuses_late_are_sent_again(run_dir: Path, server: StandIn) -> None:
    server.fault = Fault(403, on="file_stream")
    pumped = Pumped(run_dir)
    wait_for(lambda: server.requests["faulty"], what="a refused row")
    pumped.journal.append(5, {"v": 1})
    pumped.journal.flush()
    pump_finished: list[Outcome] = []
    thread = threading.Thread(target=lambda: pump_finished.append(pumped.finish(120)[0]))
    thread.start()
    wait_for(lambda: pumped.said, what="the audit to notice")
    server.fault = None
    thread.join()
    assert pump_finished[0].state == "complete"
    assert server.steps(RUN) == list(range(6))


@pytest.mark.slow  # wandb asks for it every 15 s
def test_stop_run_in_the_browser_is_answered_and_costs_no_row(run_dir: Path, server: StandIn) -> None:
    server.stop_pressed = True
    pumped = Pumped(run_dir)
    wait_for(lambda: pumped.said, what="the answer")
    pumped.journal.append(9, {"v": 1})
    outcome, _ = pumped.finish(120)
    assert outcome.state == "complete"
    assert server.steps(RUN) == [0, 1, 2, 3, 4, 9]
    assert len(pumped.said) == 1
    assert "Stop run" in pumped.said[0]


@pytest.mark.parametrize(
    ("fault", "word", "server_timeout"),
    [(Fault(401), "401", 30), (Fault("hang"), "run-1", 1)],
    ids=["401", "hang"],
)
def test_a_server_in_trouble_is_told_once_and_never_waited_for(
    fault: Fault, word: str, server_timeout: float, run_dir: Path, server: StandIn
) -> None:
    server.fault = fault
    pumped = Pumped(run_dir, server_timeout=server_timeout)
    wait_for(lambda: pumped.said, what="the message")
    outcome, seconds = pumped.finish(1)
    assert seconds < 30
    assert outcome.state == "incomplete"
    assert len(pumped.said) == 1
    assert word in pumped.said[0].lower()
    assert KEY not in "".join(pumped.said) + outcome.message


def test_a_dead_server_and_what_to_paste_when_it_is_back(
    run_dir: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stop()
    pumped = Pumped(run_dir)
    outcome, seconds = pumped.finish(2)
    assert outcome.state == "incomplete"
    assert seconds < 30
    wait_until_gone(run_dir)
    server.start()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    sent = subprocess.run(shlex.split(outcome.command), capture_output=True, text=True, timeout=120)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert server.steps(RUN) == list(range(5))


def test_rows_are_sent_in_the_gaps_that_training_leaves(run_dir: Path, server: StandIn) -> None:
    pumped = Pumped(run_dir)
    wait_for(lambda: server.steps(RUN), what="the first rows")
    policies: list[int] = []
    for pid in processes_of(run_dir):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):  # threads come and go
                policies.append(os.sched_getscheduler(int(task.name)))
    assert len(policies) > 2
    assert set(policies) == {os.SCHED_IDLE}
    pumped.finish(120)


def test_a_stopped_core_neither_holds_up_the_end_nor_stays(run_dir: Path, server: StandIn) -> None:
    pumped = Pumped(run_dir)
    wait_for(lambda: server.steps(RUN), what="the first rows")
    (core,) = [pid for pid, name in processes_of(run_dir).items() if name == "wandb-core"]
    os.kill(core, signal.SIGSTOP)
    pumped.journal.append(9, {"v": 1})
    outcome, seconds = pumped.finish(1)
    assert outcome.state == "incomplete"
    assert seconds < 30


@pytest.mark.parametrize("victim", ["wandb-core", "python"])
def test_what_is_killed_is_replaced(victim: str, run_dir: Path, server: StandIn) -> None:
    pumped = Pumped(run_dir)
    wait_for(lambda: server.steps(RUN), what="the first rows")
    (pid,) = [pid for pid, name in processes_of(run_dir).items() if name.startswith(victim)]
    os.kill(pid, signal.SIGKILL)
    pumped.journal.append(9, {"v": 1})
    outcome, _ = pumped.finish(120)
    assert outcome.state == "complete"
    assert server.steps(RUN) == [0, 1, 2, 3, 4, 9]


def test_ctrl_c_reaches_the_controller_alone(run_dir: Path, server: StandIn) -> None:
    controller = Controller(run_dir, "online")
    controller.say(10)
    wait_for(lambda: "wandb-core" in processes_of(run_dir).values(), what="wandb-core")
    before = set(processes_of(run_dir))
    (core,) = [pid for pid, name in processes_of(run_dir).items() if name == "wandb-core"]
    os.killpg(controller.process.pid, signal.SIGINT)
    assert controller.hear() == "interrupted\n"
    (feed,) = before - {controller.process.pid, core}
    for signum in (signal.SIGINT, signal.SIGTERM):  # as a batch system would send it to everything
        os.kill(feed, signum)
    controller.say(20)
    wait_for(lambda: len(server.steps(RUN)) == 20, what="the rows after Ctrl-C")
    assert set(processes_of(run_dir)) == before
    assert controller.finish(120)["state"] == "complete"
    assert server.steps(RUN) == list(range(20))


def test_offline_after_a_kill_holds_each_step_once_and_syncs(
    run_dir: Path, server: StandIn, record_type: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    controller = Controller(run_dir, "auto")
    controller.say(50)
    wait_for(lambda: list(run_dir.glob("wandb/offline-run-*/*.wandb")), what="the first offline folder")
    controller.kill()
    wait_until_gone(run_dir)

    controller = Controller(run_dir, "auto", replay_from=30)
    controller.say(80)
    outcome = controller.finish(120)
    assert (outcome["state"], outcome["rows"]) == ("offline", 80)
    (folder,) = run_dir.glob("wandb/*run-*")
    rows = offline_rows(folder, record_type)
    assert [row["_step"] for row in rows] == list(range(80))
    assert rows[7]["train/loss"] == 1.0

    assert outcome["command"] == f"wandb sync {folder}"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for _ in range(2):
        wandb = [sys.executable, "-m", "wandb", "sync", "--include-synced", str(folder)]
        sent = subprocess.run(wandb, capture_output=True, text=True, timeout=120, cwd=run_dir)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert server.steps(RUN) == list(range(80))


def test_a_run_without_rows_starts_nothing(run_dir: Path, server: StandIn) -> None:
    outcome, seconds = Pumped(run_dir, steps=0).finish(120)
    assert (outcome.state, outcome.rows) == ("complete", 0)
    assert seconds < 60
    assert not (run_dir / "wandb").exists()
    assert not server.requests


def test_disabled_starts_nothing(run_dir: Path) -> None:
    outcome, _ = Pumped(run_dir, "disabled").finish(20)
    assert outcome.state == "disabled"
    assert not (run_dir / "wandb").exists()
