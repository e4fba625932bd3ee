"""Jobs submitted to a real Slurm: to their end, through the time limit's signal and a requeue, and stopped."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import dltrain
from dltrain.launcher.submit.handle import Handle
from dltrain.launcher.submit.handles import write_handle
from launching import BIN, Sandbox, wait_for
from runs import RunFolder
from slurm_cluster import SlurmCluster, slurm, why_not
from stage import JOB, assert_same_run, gate, put_recipe

CLUSTER = "kind: slurm\nsbatch: {time: 30, exclusive: true}\nwarning: 1min\n"
ONE_THREAD = "resources.cpus_per_rank=1"  # threads share out sums: they change bits


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if reason := why_not():
        pytest.skip(reason)
    with slurm(2, cpus=2) as up:
        yield up


@pytest.fixture
def box(sandbox: Sandbox, cluster: SlurmCluster) -> Sandbox:
    """A sandbox on the cluster's first machine, with a cluster file and the staged job."""
    sandbox.prefix = cluster.machines[0].prefix
    (sandbox.folder / "here.yaml").write_text(CLUSTER, encoding="utf-8")
    put_recipe(sandbox)
    return sandbox


def submitted(box: Sandbox, cluster: SlurmCluster, *more: str) -> str:
    """Submit the staged job for two nodes; Slurm's number of it."""
    done = box.run("submit", "--cluster", "here", "--nodes", "2", *JOB, ONE_THREAD, *more, **cluster.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("submitted "), done.stdout
    return done.stdout.partition("/slurm-")[2].split()[0]


def at_gate(box: Sandbox, job: str) -> None:
    log = box.folder / f"runs/digits/slurm-{job}.log"

    def there() -> bool:
        assert not log.exists() or "failed" not in log.read_text(), log.read_text()
        return all((box.folder / f"waiting-{rank}").exists() for rank in range(2))

    wait_for(there, what="ranks at the gate", timeout=120)


@pytest.mark.campaign
def test_the_signal_of_the_time_limit_saves_requeues_and_goes_on_to_the_same_weights(
    box: Sandbox, cluster: SlurmCluster, reference: RunFolder
) -> None:
    checked = box.run("cluster", "check", "here.yaml", **cluster.environ)
    assert checked.returncode == 0, checked.stderr
    assert "Job" in checked.stdout
    (box.folder / "until-told").touch()
    closed = gate(box)
    job = submitted(box, cluster, "--resume", "never")
    at_gate(box, job)
    status = box.run("status", "--json", **cluster.environ)
    assert status.returncode == 0, status.stderr
    told = json.loads(status.stdout)
    assert (told["name"], told["state"], told["nodes"]) == ("digits/0001", "running", ["m0", "m1"])
    assert told["job"] == {"kind": "slurm", "id": job, "state": "running", "words": "RUNNING"}

    cluster.ask("scancel", "--batch", "--signal=USR1", job)  # what Slurm does `warning` before the limit
    closed.unlink()  # the ranks go on when they have been told
    wait_for(lambda: cluster.fields(job).get("Restarts") == "1", what="the requeue", timeout=120)
    followed = box.run("logs", "-f", f"digits/slurm-{job}", timeout=180, **cluster.environ)
    assert "back into the queue" in followed.stdout
    assert "digits: finished" in followed.stdout
    run = RunFolder(box.folder / "runs/digits/0001")
    assert_same_run(run, reference)
    assert run.record()["generations"] == 2
    assert not list(Path("/tmp").glob(f"dltrain-{job}/session_*")), "Ray's files are left"
    listed = box.run("runs", **cluster.environ)
    assert [line.split()[:3] for line in listed.stdout.splitlines()[1:]] == [["digits/0001", "finished", "60"]]
    assert f"slurm-{job}" in listed.stdout


@pytest.mark.campaign
def test_a_submitted_job_is_stopped_from_outside_and_a_waiting_one_cancelled(
    box: Sandbox, cluster: SlurmCluster
) -> None:
    (box.folder / "until-told").touch()
    closed = gate(box)
    job = submitted(box, cluster)
    at_gate(box, job)
    waiting = submitted(box, cluster, "name=later")
    queued = box.run("status", **cluster.environ)
    assert queued.stdout.startswith(f"later/slurm-{waiting}  queued (PENDING, "), queued.stdout + queued.stderr
    cancelled = box.run("stop", "later", **cluster.environ)
    assert f"later/slurm-{waiting}: stopped (CANCELLED)" in cancelled.stdout, cancelled.stderr

    with box.start("stop", "digits", **cluster.environ) as process:
        wait_for(lambda: told_to_stop(box), what="the request", timeout=60)
        closed.unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"digits/slurm-{job}: stopped" in out
    assert "digits/0001: stopped after step" in out
    assert RunFolder(box.folder / "runs/digits/0001").checkpoints()


def told_to_stop(box: Sandbox) -> bool:
    facts = json.loads((box.folder / "runs/digits/0001/status.json").read_text())
    return facts["stop_requests"] > 0


SCONTROL = """\
#!/bin/sh
[ "$1" = --clusters=far ] && echo JobId=7 JobState=RUNNING ExitCode=0:0 || { echo "Invalid job id" >&2; exit 1; }
"""


def test_a_job_that_sbatch_gave_to_another_cluster_is_asked_for_there(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("scontrol", SCONTROL), ("sacct", "#!/bin/sh\n")):
        command = empty_folder / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(text, encoding="utf-8")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{empty_folder}/bin:/usr/bin:/bin")
    write_handle(Path("runs"), Handle("slurm", "7", "digits", {"cluster": "far"}))
    assert dltrain("status").out == "digits/slurm-7  running (RUNNING)\n"


JOBS = """\
#!/bin/sh
case "$4" in
"") cat {folder}/jobs ;;
*) grep "^JobId=$4 " {folder}/jobs ;;
esac
"""


def test_jobs_are_found_in_slurm_where_no_handle_is(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a scontrol that answers as the real one does; the jobs of others, and those of no dltrain, are left out."""
    me, runs = f"me({os.getuid()})", empty_folder / "shared runs"
    when = "ExitCode=0:0 SubmitTime=2026-01-02T03:04:0{}"
    line = f"JobId={{}} JobName={{}} UserId={{}} JobState={{}} Reason=None {when} StdOut={{}} Power="
    rows = [
        line.format(41, "digits", me, "COMPLETED", 1, runs / "digits/slurm-41.log"),
        line.format(42, "digits", me, "RUNNING", 2, runs / "digits/slurm-42.log"),
        line.format(43, "digits", "other(1)", "RUNNING", 3, runs / "digits/slurm-43.log"),
        line.format(44, "digits", me, "RUNNING", 4, empty_folder / "slurm-44.out"),
    ]
    Path("jobs").write_text("\n".join(rows) + "\n", encoding="utf-8")
    Path("bin").mkdir()
    Path("bin/scontrol").write_text(JOBS.format(folder=empty_folder), encoding="utf-8")
    Path("bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{empty_folder}/bin:/usr/bin:/bin")
    Path("here.yaml").write_text(CLUSTER, encoding="utf-8")
    (runs / "digits").mkdir(parents=True)
    (runs / "digits/slurm-42.log").write_text("the launch\n", encoding="utf-8")
    listed = dltrain("runs", "--cluster", "here", "--json")
    assert listed.code == 0, listed.err
    assert [(row["name"], row["state"]) for row in json.loads(listed.out)] == [
        ("digits/slurm-42", "running"),
        ("digits/slurm-41", "finished"),
    ]
    for word in ((), ("42",), ("digits",), ("slurm-42",), ("digits/slurm-42",)):
        assert dltrain("status", *word, "--cluster", "here").out == "digits/slurm-42  running (RUNNING)\n"
    logs = [BIN / "dltrain", "logs", "42", "--cluster", "here"]
    assert subprocess.run(logs, capture_output=True, text=True, check=True).stdout == "the launch\n"


def test_a_dry_run_shows_the_script_and_starts_nothing(empty_folder: Path) -> None:
    Path("here.yaml").write_text(CLUSTER, encoding="utf-8")
    shown = dltrain("submit", "--cluster", "here", "--nodes=2", "--dry-run", "--run-dir=out", "train.epochs=3")
    assert shown.code == 0, shown.err
    assert "#SBATCH --signal=B:USR1@60" in shown.out
    assert f"launch=(dltrain launch --nodes=2 --run-dir={empty_folder}/out)" in shown.out
    assert not Path("out").exists()
