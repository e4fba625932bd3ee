"""``dltrain status``, ``logs`` and ``stop``: a run looked at and ended from another process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import dltrain
from dltrain.core.errors import JobError
from dltrain.core.job import Job
from dltrain.core.processes import Driver, Process
from dltrain.launcher.logs import Logs, Pick
from dltrain.launcher.rundir import Record, RunDir
from dltrain.launcher.runs import find_run, look, stop_run
from dltrain.tracking.journal import Journal
from launching import Sandbox, wait_for
from stage import JOB, LAUNCH, STEPS, WAIT_AT, gate, put_recipe, run_of, wait_at_gate

DRIVER = """
import os, sys
from pathlib import Path
from dltrain.launcher.rundir import RunDir
run = RunDir.create(Path(sys.argv[1]), "mine", {})
print("there", flush=True)
sys.stdin.read()
"""


def finished(runs: Path, name: str, **changes: Any) -> Path:
    run = RunDir.create(runs, name, Job(name=name).model_dump(mode="json"))
    run.update(state="finished", **changes)
    run.close()
    return run.path


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has made the run mine/0001, and holds it."""
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        yield process
        process.kill()


# ---- which run


def test_a_run_is_found_by_path_name_or_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    first, second, other = finished(runs, "mine"), finished(runs, "mine"), finished(runs, "other")
    monkeypatch.chdir(tmp_path)
    assert find_run(Path("runs"), None) == other
    again = RunDir.reopen(first)
    assert again is not None
    again.update(driver=Driver.here())  # launched again, last of all
    again.close()
    assert find_run(Path("runs"), None) == first
    for word in ("mine", "runs/mine", "mine/2", "mine/0002", "runs/mine/latest", str(second)):
        assert find_run(Path("runs"), word) == second
    with pytest.raises(JobError, match=r"there is no run 'min' in runs \(did you mean 'mine'\?\)"):
        find_run(Path("runs"), "min")
    with pytest.raises(JobError, match="there is no run in elsewhere"):
        find_run(Path("elsewhere"), None)


def test_a_run_whose_record_cannot_be_read_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finished(Path("runs"), "mine")
    damaged = finished(Path("runs"), "mine") / "run.json"
    damaged.write_text('{"written": "by another version"}')
    listed = dltrain("runs")
    assert listed.code == 0, listed.err
    assert [line.split()[:2] for line in listed.out.splitlines()[1:]] == [
        ["mine/0001", "finished"],
        ["mine/0002", "damaged"],
    ]
    asked = dltrain("status", "mine/2")
    assert (asked.code, "run.json is damaged" in asked.err) == (2, True)


def test_a_driver_that_is_gone_without_a_word_is_told_from_one_that_lives(
    tmp_path: Path, driven: subprocess.Popen[str]
) -> None:
    run = tmp_path / "mine/0001"
    assert (look(run).state, look(run).pid, look(run).here) == ("running", driven.pid, True)
    driven.kill()
    wait_for(lambda: look(run).state == "died", what="the end to be noticed")  # not reaped yet: a zombie is no driver
    driven.wait()
    assert look(run).state == "died"


def test_a_later_process_with_the_drivers_number_is_not_taken_for_it(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "mine", {})
    me = Driver.here()
    run.update(driver=replace(me, process=replace(me.process, started=me.process.started - 1)))
    assert not replace(me.process, started=me.process.started - 1).signal(signal.SIGKILL)
    assert look(run.path).state == "died"
    assert stop_run(run.path, now=True, say=print).state == "died"  # and this process goes on
    run.close()


def test_a_driver_on_another_machine_is_left_alone(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "mine", {})
    run.update(driver=replace(Driver.here(), host="far", boot="another"))
    assert (look(run.path).state, look(run.path).here) == ("running", False)
    with pytest.raises(JobError, match=r"on far, which is not this machine .*on far: dltrain stop"):
        stop_run(run.path, now=False, say=print)
    run.update(driver=replace(Driver.here(), boot="an earlier one"))
    assert look(run.path).state == "died"  # the machine has started anew since
    run.close()


BUSY = """
import json, signal, sys, time
from pathlib import Path
from dltrain.launcher.interrupt import StopRequests
from dltrain.launcher.rundir import RunDir
run = RunDir.create(Path(sys.argv[1]), "mine", {})
with StopRequests() as stop:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    print("there", flush=True)
    time.sleep(1)  # it gets no core
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    while stop.count < 2:
        run.write("status.json", json.dumps({"at": time.time(), "stop_requests": stop.count}), sync=False)
        time.sleep(0.05)
run.update(state="stopped")
"""


def test_a_driver_that_hears_late_counts_both_requests(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUSY, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        try:
            assert stop_run(tmp_path / "mine/0001", now=True, say=print).state == "stopped"
        finally:
            process.kill()


def test_what_an_earlier_launch_wrote_is_not_said_of_the_present_one(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "mine", {})
    assert run.record.driver is not None
    for apart, counted in ((-1.0, 0), (1.0, 1)):
        run.write("status.json", json.dumps({"at": run.record.driver.since + apart, "stop_requests": 1}))
        assert look(run.path).stop_requests == counted
    run.close()


def test_a_record_without_a_driver_is_read(tmp_path: Path) -> None:
    path = finished(tmp_path, "mine", step=7)
    data = json.loads((path / "run.json").read_text())
    for key in ("driver", "logs", "ranks_per_node"):
        del data[key]
    (path / "run.json").write_text(json.dumps(data))
    assert (look(path).state, look(path).step) == ("finished", 7)
    assert Process.of(2**22 + 1) is None


def test_status_is_strict_json_whatever_the_loss_has_become(tmp_path: Path) -> None:
    path = finished(tmp_path, "mine")
    journal = Journal(path / "metrics.jsonl")
    journal.append(8, {"train/loss": 0.5})
    journal.append(9, {"train/loss": float("nan"), "n": 3})
    journal.close()
    assert look(path).step == 9
    assert json.loads(json.dumps(look(path).to_json(), allow_nan=False))["metrics"] == {"train/loss": "NaN", "n": 3}


# ---- what the ranks printed


def put(run: Path, generation: int, rank: int, text: bytes, stream: str = "stdout") -> None:
    folder = run / f"logs/attempt-{generation}/rank-{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{stream}.log").open("ab") as file:
        file.write(text)


def test_logs_are_of_every_generation_and_of_whom_was_asked_for(tmp_path: Path) -> None:
    run = finished(tmp_path, "mine", ranks_per_node=((0, 1), (1, 2)))
    for generation, rank in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        put(run, generation, rank, f"{generation}{rank}\n".encode())
    put(run, 0, 0, b"half", "stderr")
    everything = [b"0, rank 0] half", b"0, rank 0] 00", b"0, rank 1] 01", b"1, rank 0] 10", b"1, rank 1] 11"]
    everything.append(b"1, rank 2] 12")
    assert sorted(Logs(run).read()) == sorted(b"[generation " + line + b"\n" for line in everything)
    assert [line[-3:-1] for line in Logs(run, Pick(ranks=[1])).read()] == [b"01", b"11"]
    assert [line[-3:-1] for line in Logs(run, Pick(nodes=[1])).read()] == [b"01", b"12"]
    assert [line[-3:-1] for line in Logs(run, Pick(generations=[0], ranks=[1])).read()] == [b"01"]


def test_ranks_that_the_run_has_not_had_are_refused_with_those_that_it_has(tmp_path: Path) -> None:
    run = finished(tmp_path, "mine", ranks_per_node=((0, 2),))
    nobody = ("logs", "mine", f"--run-dir={tmp_path}", "--rank=7")
    assert (dltrain(*nobody).code, dltrain(*nobody).out) == (0, "")  # it ended before it had any
    for generation, rank in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
        put(run, generation, rank, b"a\n")
    for options, says in (
        ("--rank=7", "--rank: the run has no logs of rank 7 there are those of rank 0 to 3"),
        ("--rank=7 -f", "--rank: the run has no logs of rank 7 there are those of rank 0 to 3"),
        ("--rank=1 --node=9 --node=8", "--node: the run has no logs of node 8 to 9 there are those of node 0 to 1"),
        (
            "--rank=0 --generation=2",
            "--generation: the run has no logs of generation 2 there are those of generation 0 to 1",
        ),
        ("--rank=3 --generation=1", "the run has logs of each that was asked for, and none of all at once"),
    ):
        refused = dltrain("logs", "mine", f"--run-dir={tmp_path}", *options.split())
        assert (refused.code, refused.out) == (2, ""), refused.err
        assert says in " ".join(refused.err.split())
        assert "waiting" not in refused.err  # it has ended
    shown = dltrain("logs", "mine", f"--run-dir={tmp_path}", "--rank=3")
    assert (shown.code, shown.out) == (0, "[generation 0, rank 3] a\n")


def test_following_takes_in_what_comes_until_the_end(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "mine", {})
    put(run.path, 0, 0, b"a\nb")
    got: list[bytes] = []

    def follow() -> None:
        for line in Logs(run.path).follow():
            got.append(line)

    reader = threading.Thread(target=follow)
    reader.start()
    wait_for(lambda: len(got) == 1, what="the first line")
    put(run.path, 0, 0, b"c\n")
    wait_for(lambda: len(got) == 2, what="the second line")
    put(run.path, 0, 0, b"d")  # the generation dies in the middle of a line
    put(run.path, 1, 0, b"e\n")
    wait_for(lambda: len(got) == 4, what="the next generation")
    put(run.path, 1, 0, b"f")
    run.update(state="failed")
    reader.join(30)
    assert not reader.is_alive()
    assert got == [
        f"[generation {g}, rank 0] {t}\n".encode() for g, t in ((0, "a"), (0, "bc"), (0, "d"), (1, "e"), (1, "f"))
    ]
    run.close()


def test_what_is_not_there_yet_is_waited_for_and_then_refused_after_all_that_is(sandbox: Sandbox) -> None:
    run = RunDir.create(sandbox.folder / "runs", "mine", {})
    put(run.path, 0, 0, b"a\nb")
    with sandbox.start("logs", "-f", "--rank=0", "--rank=7") as following:
        assert following.stderr is not None
        assert "so far, the run has no logs of rank 7: waiting" in following.stderr.readline()
        run.update(state="failed")
        out, err = following.communicate(timeout=60)
    run.close()
    assert following.returncode == 2, err
    assert out == "[generation 0, rank 0] a\n[generation 0, rank 0] b\n"
    assert "the run has no logs of rank 7" in err


# ---- the commands, against a launch


def as_json(box: Sandbox, *args: str) -> dict[str, Any]:
    return json.loads(box.run("status", "--json", *args).stdout)


def places(status: dict[str, Any]) -> list[tuple[int, int, int, str]]:
    """Of each rank, its number, its node, and where it is."""
    return [(rank["rank"], rank["node"], rank["step"], rank["phase"]) for rank in status["ranks"]]


def test_a_launch_is_seen_followed_and_stopped(sandbox: Sandbox) -> None:
    put_recipe(sandbox)
    (sandbox.folder / "until-told").touch()
    closed = gate(sandbox)
    with sandbox.start(*LAUNCH, *JOB, "model.say=hello") as process:
        wait_at_gate(sandbox, process)
        at_the_gate = [(rank, rank, WAIT_AT, "forward") for rank in range(2)]
        status = wait_for(
            lambda: places(s := as_json(sandbox)) == at_the_gate and s["checkpoint"] == WAIT_AT and s,
            what="the status to say where the ranks are, and the checkpoint before the gate",
        )
        assert isinstance(status, dict)
        assert (status["state"], status["pid"], status["total_steps"]) == ("running", process.pid, STEPS)
        assert (status["world"], status["generation"]) == (2, 0)
        assert {"stall_seconds", "durable_seconds", "bytes"} == status["checkpoint_cost"].keys()
        with sandbox.start("logs", "-f", "digits/1") as follower:
            assert follower.stdout is not None
            lines = {follower.stdout.readline() for _ in range(2)}
            assert lines == {f"[generation 0, rank {rank}] hello\n" for rank in range(2)}
            closed.unlink()
            stopped = sandbox.run("stop")
            process.wait(60)
            rest, _ = follower.communicate(timeout=60)
        assert stopped.returncode == 0, stopped.stderr
    assert process.returncode == 128 + signal.SIGINT
    assert rest == ""
    assert f"digits/0001: stopped after step {run_of(sandbox).checkpoints()[-1]}" in stopped.stdout
    again = sandbox.run("stop", "digits")
    assert (again.returncode, again.stdout) == (0, stopped.stdout.splitlines()[-1] + "\n")
    assert sandbox.run("status").returncode == 3
    assert as_json(sandbox)["goodput"] > 0


@pytest.mark.slow
def test_stop_now_ends_a_run_that_does_not_heed_and_a_killed_driver_shows(sandbox: Sandbox) -> None:
    put_recipe(sandbox)
    gate(sandbox)  # stays closed
    with sandbox.start(*LAUNCH, *JOB) as process:
        wait_at_gate(sandbox, process)
        stopped = sandbox.run("stop", "--now")
        process.wait(60)
        assert (stopped.returncode, process.returncode) == (0, 130), stopped.stderr
    assert run_of(sandbox).record()["state"] == "stopped"
    gate(sandbox)
    with sandbox.start(*LAUNCH, *JOB) as process:
        wait_at_gate(sandbox, process)
        process.kill()
        process.wait()
    status = sandbox.run("status", "digits")
    assert status.returncode == 1
    assert "died: its driver is gone without a word" in status.stdout


SCRIPT = """
import os, pathlib, signal, sys, time
import dltrain
print("begun", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
dltrain.context().log({"train/loss": 0.5}, step=3)
deadline = time.monotonic() + 200
if os.environ["RANK"] == "0":
    pathlib.Path("begun").touch()
elif os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    while not pathlib.Path("begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
while time.monotonic() < deadline:
    time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_script_is_followed_over_a_restart_and_stopped(sandbox: Sandbox) -> None:
    (sandbox.folder / "train.py").write_text(SCRIPT, encoding="utf-8")
    command = ("launch", "--nproc-per-node", "2", "--max-restarts", "1", "--log-dir", "kept", "train.py")
    with sandbox.start(*command) as process:
        wait_for(lambda: list(sandbox.folder.glob("kept/*/attempt-0/rank-0/stdout.log")), what="the first start")
        with sandbox.start("logs", "-f", "train") as follower:
            assert follower.stdout is not None
            lines = [follower.stdout.readline() for _ in range(4)]
            status = wait_for(
                lambda: (s := as_json(sandbox)) and (s["step"], s["restarts"]) == (3, 1) and s,
                what="the logged step, and the restart",
            )
            assert isinstance(status, dict)
            assert (status["generation"], status["world"]) == (1, 2)
            assert status["metrics"] == {"train/loss": 0.5}
            stopped = sandbox.run("stop", "train/1")
            process.wait(60)
            assert stopped.returncode == 0, stopped.stderr
            rest, _ = follower.communicate(timeout=60)
    assert sorted(lines) == [f"[generation {g}, rank {r}] begun {g}\n" for g in (0, 1) for r in (0, 1)]
    assert "KeyboardInterrupt" in rest  # as Ctrl-C does to a script
    assert [path.name for path in (sandbox.folder / "kept").iterdir()] == ["train-0001"]
    assert Record.read(sandbox.folder / "runs/train/0001") is not None
