"""How runs end: asked to, killed, failing; what they say, what they leave, and that the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from launching import Sandbox, said, wait_for
from runs import RunFolder
from stage import (
    JOB,
    LAUNCH,
    STEPS,
    WAIT_AT,
    assert_same_run,
    ctrl_c,
    gate,
    put_recipe,
    run_of,
    stop_at,
    wait_at_gate,
)
from wandb_server import Fault, StandIn


@pytest.fixture
def box(sandbox: Sandbox) -> Sandbox:
    put_recipe(sandbox)
    return sandbox


# ---- asked to stop


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_bits(box: Sandbox, reference: RunFolder) -> None:
    with StandIn() as server:
        online = {
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "k" * 40,
            "WANDB_CACHE_DIR": str(box.folder / "wandb-cache"),
            "WANDB_CONFIG_DIR": str(box.folder / "wandb-config"),
        }
        command = (*LAUNCH, *JOB, "tracking.wandb.mode=online", "tracking.tensorboard=true")
        out, err = stop_at(box, WAIT_AT, *command, **online)
        run = run_of(box)
        assert "stopping: saving a checkpoint" in out
        saved = re.search(r"the same command goes on from step (\d+)", err)
        assert saved, err
        assert int(saved[1]) == run.checkpoints()[-1] == run.steps()[-1] >= WAIT_AT
        assert run.record()["state"] == "stopped"
        done = box.run(*command, **online)
        assert done.returncode == 0, done.stderr
        assert "continuing runs/digits/0001" in done.stdout
        assert f"from step {saved[1]} to step {STEPS}" in done.stdout
        assert_same_run(run, reference)
        assert list(server.runs) == [run.record()["id"]]
        assert server.steps(run.record()["id"]) == list(range(1, STEPS + 1))
        assert not server.overwritten
    assert list((run.path / "tensorboard").iterdir())


def test_a_second_ctrl_c_ends_at_once_even_when_wandb_hangs(box: Sandbox) -> None:
    with StandIn() as server:
        server.fault = Fault("hang")
        online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40}
        gate(box)
        with box.start(*LAUNCH, *JOB, "tracking.wandb.mode=online", **online) as process:
            wait_at_gate(box, process)
            ctrl_c(process)
            before = said(process, "stopping: saving a checkpoint")
            time.sleep(0.5)  # two signals at once count as one request
            begin = time.monotonic()
            ctrl_c(process)
            out, err = process.communicate(timeout=120)
            took = time.monotonic() - begin
        out = before + out
        assert process.returncode == 130, err
        assert took < 50  # not the minute that the trackers may take
        assert "stopped at once" in err
        assert "not all rows were sent" in out
        assert "wandb_feed" in out
        assert run_of(box).record()["state"] == "stopped"


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)], ids=lambda s: s.name
)
def test_other_signals_stop_as_gently(box: Sandbox, signum: signal.Signals) -> None:
    _, err = stop_at(box, WAIT_AT, *LAUNCH, *JOB, signum=signum)
    assert "the same command goes on from step" in err
    assert run_of(box).checkpoints()[-1] == run_of(box).steps()[-1] >= WAIT_AT


SLOW = "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(100)\nSlow = 1\n"


@pytest.mark.parametrize(
    ("moment", "signum"),
    [
        ("-m dltrain.launcher.forkserver", signal.SIGINT),  # nothing else has been started
        pytest.param("gcs/gcs_server", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("raylet/raylet", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_stop_while_processes_start_leaves_nothing(box: Sandbox, moment: str, signum: signal.Signals) -> None:
    (box.folder / "slow.py").write_text(SLOW, encoding="utf-8")  # so that training cannot have begun meanwhile
    with box.start(*LAUNCH, "recipe=slow:Slow") as process:
        wait_for(lambda: any(moment in line for line in box.processes().values()), what=moment)
        os.killpg(process.pid, signum)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, err
    assert "stopped before training began" in err
    assert "Traceback" not in out + err
    assert not (box.folder / "runs").exists()


def test_a_stop_while_the_recipe_is_imported_leaves_nothing(box: Sandbox) -> None:
    (box.folder / "slow.py").write_text(SLOW, encoding="utf-8")
    with box.start("launch", "recipe=slow:Slow") as process:
        wait_for((box.folder / "importing").exists, what="the import")
        wait_for(lambda: any("NodeAgent" in line for line in box.processes().values()), what="the node's agent")
        begin = time.monotonic()
        ctrl_c(process)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert time.monotonic() - begin < 50  # not the minute that the trackers may take
    assert "stopped before training began" in err
    assert not (box.folder / "runs").exists()


def test_a_run_goes_on_when_nobody_reads_what_it_says(box: Sandbox) -> None:
    with box.start("launch", *JOB, "model.say=hello") as process:
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in err) == (0, False), err
    assert run_of(box).record()["state"] == "finished"


@pytest.mark.slow
def test_a_launch_that_was_suspended_has_lost_nobody_when_it_goes_on(box: Sandbox, reference: RunFolder) -> None:
    closed = gate(box)
    with box.start(*LAUNCH, *JOB) as process:
        wait_at_gate(box, process)
        os.kill(process.pid, signal.SIGSTOP)  # Ctrl-Z
        time.sleep(35)  # longer than a node may be silent
        os.kill(process.pid, signal.SIGCONT)
        closed.unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert_same_run(run_of(box), reference)


# ---- killed


def victim(box: Sandbox, name: str) -> int:
    if name == "fork server":
        forks = {pid for pid, line in box.processes().items() if "launcher.forkserver" in line}
        (server,) = (pid for pid in forks if _parent(pid) not in forks)  # ranks and what they start have its command
        return server
    return box.named(name)[0]


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dltrain-rank1", r"rank 1 on node 1 failed with SIGKILL"),
        ("fork server", r"the fork server died"),
        pytest.param("dltrain-rank0", r"rank 0 on node 0 failed with SIGKILL", marks=pytest.mark.slow),
        pytest.param("ray::NodeAgent", r"node [01] was lost: its agent", marks=pytest.mark.slow),
        pytest.param("raylet", r"Ray's raylet was killed by SIGKILL", marks=pytest.mark.slow),
        pytest.param("gcs_server", r"Ray's gcs_server was killed by SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_is_named_and_nothing_outlives_the_run(box: Sandbox, name: str, says: str) -> None:
    gate(box)  # stays closed: ranks that went on could be done before the death is noticed, and that is no failure
    kept = () if name in ("raylet", "gcs_server") else ("--max-restarts", "0")  # without Ray nothing is tried
    with box.start(*LAUNCH, *JOB, *kept) as process:
        wait_at_gate(box, process)
        os.kill(victim(box, name), signal.SIGKILL)
        begin = time.monotonic()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert time.monotonic() - begin < 60
    assert re.search(says, err), err
    assert re.search(says, out), out
    assert out.count("The run failed") == 1
    assert len((out + err).splitlines()) < 60, out + err
    assert "(raylet)" not in out + err  # Ray's own words of it
    run = run_of(box)
    assert run.record()["state"] == "failed"
    assert re.search(says, (run.path / "failures/0000.txt").read_text())


def test_a_killed_launcher_takes_everything_along_and_can_go_on(box: Sandbox, reference: RunFolder) -> None:
    closed = gate(box)
    with box.start(*LAUNCH, *JOB) as process:
        wait_at_gate(box, process)
        wait_for(lambda: WAIT_AT in run_of(box).checkpoints(), what="the checkpoint in the background")
        process.kill()
        process.wait()
    assert not box.leftovers()
    assert run_of(box).checkpoints()[-1] == WAIT_AT
    closed.unlink()
    done = box.run(*LAUNCH, *JOB)
    assert done.returncode == 0, done.stderr
    assert f"from step {WAIT_AT} to step {STEPS}" in done.stdout
    assert_same_run(run_of(box), reference)


# ---- failing


def test_a_bug_in_the_recipe_makes_one_short_report(box: Sandbox) -> None:
    done = box.run(*LAUNCH, *JOB, "model.raise_at=5", "model.rank=1")
    assert done.returncode == 1
    shown = done.stdout + done.stderr
    assert shown.count("Traceback (most recent call last)") == 1, shown
    assert shown.count("The run failed: rank 1 on node 1 failed with ValueError.") == 1
    assert re.search(r"phase: \w+, step 5\n\s+error: ValueError: staged", shown), shown
    assert "staged.py" in shown
    assert len(shown.splitlines()) < 60
    assert "report: " in done.stderr


def test_an_accident_is_followed_by_a_restart_from_the_newest_checkpoint(box: Sandbox, reference: RunFolder) -> None:
    job = (*JOB, "recovery.snapshot=never", "model.raise_once_at=25", "model.rank=0")
    done = box.run(*LAUNCH, *job, "--max-restarts", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting all ranks again (1 of 2)" in done.stdout
    assert f"from step 20 to step {STEPS}" in done.stdout
    assert_same_run(run_of(box), reference)
    assert (run_of(box).path / "failures/0000.txt").exists()


@pytest.mark.slow
def test_the_same_bug_twice_is_not_tried_a_third_time(box: Sandbox, reference: RunFolder) -> None:
    command = (*LAUNCH, *JOB, "--max-restarts", "5", "model.raise_at=25", "model.rank=0")
    done = box.run(*command)
    assert done.returncode == 1
    assert "the same as before, so another try would end alike" in done.stderr
    assert sorted(path.name for path in (run_of(box).path / "failures").glob("*.txt")) == ["0000.txt", "0001.txt"]
    (box.folder / "mended").touch()
    assert box.run(*command).returncode == 0
    assert_same_run(run_of(box), reference)


@pytest.mark.parametrize("nodes", [pytest.param("2", marks=pytest.mark.slow), "1"])
def test_a_rank_that_leaves_early_without_an_error_is_no_success(box: Sandbox, nodes: str) -> None:
    done = box.run("launch", "--nodes", nodes, *JOB, "model.exit_at=5", f"model.rank={int(nodes) - 1}")
    assert done.returncode == 1, done.stdout
    assert f"rank {int(nodes) - 1} on node {int(nodes) - 1} failed with exit code 0 before the end" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run_of(box).path / "weights.safetensors").exists()


@pytest.mark.slow
def test_a_rank_that_hangs_is_killed_after_the_grace_of_a_stop(box: Sandbox) -> None:
    (box.folder / "hang").touch()
    hang = ("model.hang_in_evaluation=true", "model.rank=1", "recovery.stop_grace=2s")
    with box.start(*LAUNCH, *JOB, *hang) as process:
        wait_for((box.folder / "waiting-1").exists, what="the hang")
        begin = time.monotonic()
        ctrl_c(process)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert 2 < time.monotonic() - begin < 40
    assert "ranks did not end within 2 s and were killed" in err
