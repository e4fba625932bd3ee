"""``dltrain chaos``: the language of faults, random schedules, the verdict, and faults played for real."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
from command import dltrain
from dltrain.core.errors import JobError
from dltrain.core.processes import Process
from dltrain.launcher.chaos.faults import KINDS, Fault, check_faults, parse_faults
from dltrain.launcher.chaos.machines import why_not
from dltrain.launcher.chaos.schedules import random_schedule
from dltrain.launcher.chaos.verdict import Trace, differences
from hypothesis import given
from hypothesis import strategies as st
from launching import Sandbox, wait_for

LIMIT = 600.0  # seconds, against a hang: a busy machine takes over a minute for two runs and their cluster
pytestmark = pytest.mark.timeout(900)

# the language


def test_faults_are_read_in_every_way_to_write_them() -> None:
    assert parse_faults(
        " kill:rank=3@step=50, stop:1@120,driver@12.5s, persister : rank = 0 @ step = 7, partition:1@9s / 0.5s,"
    ) == (
        Fault("kill", 3, 50),
        Fault("stop", 1, 120),
        Fault("driver", seconds=12.5),
        Fault("persister", 0, 7),
        Fault("partition", 1, seconds=9.0, lasts=0.5),
    )


WHEN = st.one_of(
    st.builds(lambda step: {"step": step}, st.integers(0, 10**6)),
    st.builds(lambda tenths: {"seconds": tenths / 10}, st.integers(0, 9999)),
)
LASTS = st.integers(1, 9999).map(lambda tenths: tenths / 10)


@given(kind=st.sampled_from(sorted(KINDS)), target=st.integers(0, 999), when=WHEN, lasts=LASTS)
def test_a_fault_reads_as_it_is_written(kind: str, target: int, when: dict[str, float], lasts: float) -> None:
    more = when | ({"lasts": lasts} if KINDS[kind].lasts else {})
    fault = Fault(kind, target if KINDS[kind].unit else -1, **more)  # pyright: ignore[reportArgumentType]
    assert parse_faults(str(fault)) == (fault,)


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("kil:rank=1@5", "no fault is called 'kil'", "did you mean 'kill'?"),
        ("kill:rank=1", "it does not say when", "add @step=50, or @12.5s"),
        ("kill@5", "it does not say which rank", "write kill:rank=0@…"),
        ("node:rank=1@5", "'node' happens to a node, not a 'rank'", "write node:node=1@…"),
        ("kill:node=1@5", "'kill' happens to a rank, not a 'node'", "write kill:rank=1@…"),
        ("kill:rank=x@5", "'x' is no number of a rank", "write kill:rank=0@…"),
        ("driver:rank=1@5", "'driver' takes no 'rank=1'", "write driver@…"),
        ("stop:1@later", "'later' is no step or time", "write @step=50, or @12.5s"),
        ("stop:1@step=5s", "'5s' is no step", "write @step=50, or @12.5s"),
        ("stop:1@loss=5", "'loss' is no measure of time", "write @step=50, or @12.5s"),
        ("partition:node=1@5", "it does not say for how long", "add /5s"),
        ("partition:node=1@5/0s", "'0s' is no length of time", "write /5s"),
        ("partition:node=1@5/9", "'9' is no length of time", "write /5s"),
        ("kill:rank=1@5/5s", "'kill' is never over", "leave out /5s"),
        (" , ", "there is no fault in it", "as kill:rank=3@step=50, or driver@12.5s"),
    ],
)
def test_what_is_wrong_with_a_fault_is_said(text: str, what: str, hint: str) -> None:
    with pytest.raises(JobError) as caught:
        parse_faults(text)
    (problem,) = caught.value.problems
    assert (problem.what, problem.hint) == (what, hint)
    assert problem.where.startswith("--faults")


def test_all_problems_are_said_at_once() -> None:
    done = dltrain("chaos", "--faults", "kil:rank=1@5, stop:1")
    assert done.code == 2
    assert "2 problems; nothing was started" in done.err


def test_faults_that_cannot_happen_to_the_run_are_refused() -> None:
    faults = parse_faults("kill:rank=2@5, driver@99")
    assert [problem.what for problem in check_faults(faults, world=2, nodes=1, steps=50)] == [
        "there is no rank 2",
        "the run has 50 steps",
    ]
    assert not check_faults(faults, world=3, nodes=1, steps=100)


def test_where_no_link_can_be_cut_a_partition_is_refused_before_anything_starts(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(empty_folder))
    refused = dltrain("chaos", "--faults", "partition:node=0@5/5s")
    assert refused.code == 2
    assert "no node's link can be cut here" in refused.err
    assert "it needs ip, unshare, nsenter" in refused.err
    assert not list(empty_folder.iterdir())


@pytest.mark.parametrize("words", [(), ("--faults", "driver@5", "--random", "3"), ("--random", "0")])
def test_either_faults_or_random_schedules_are_played(words: tuple[str, ...]) -> None:
    assert dltrain("chaos", *words).code == 2


# random schedules


def test_a_random_schedule_is_the_same_every_time() -> None:
    assert random_schedule(1, 17, world=4, nodes=2, steps=100) == random_schedule(1, 17, world=4, nodes=2, steps=100)
    pinned = random_schedule(0, 1, world=4, nodes=2, steps=100, kinds=("kill", "driver"))
    assert (
        ", ".join(map(str, pinned)) == "driver@step=12, driver@step=12, driver@step=60"
    )  # on every machine and Python
    drawn = [random_schedule(seed, number, world=4, nodes=2, steps=100) for seed in (0, 1) for number in range(1, 101)]
    faults = [fault for faults in drawn for fault in faults]
    assert len(set(drawn)) > 190
    assert {fault.kind for fault in faults} == set(KINDS) - {"partition"}
    assert {fault.target for fault in faults} == {-1, 0, 1, 2, 3}
    assert all(10 <= (fault.step or 0) <= 85 for fault in faults)


# the verdict

CLEAN = Trace("a" * 64, {1: {"train/loss": 2.0}, 2: {"train/loss": 1.0}}, (1, 2), 2, 128, {"model.w": "b" * 64})


@pytest.mark.parametrize(
    ("trace", "said"),
    [
        (CLEAN, []),
        (replace(CLEAN, weights="c" * 64), ["weights are cccccccccccc, not aaaaaaaaaaaa"]),
        (replace(CLEAN, rows={**CLEAN.rows, 2: {"train/loss": 1.1}}), ["metrics differ from step 2 on (train/loss)"]),
        (replace(CLEAN, steps=(1, 2, 2)), ["the metrics have 1 steps twice"]),
        (replace(CLEAN, steps=(1,)), ["the metrics have 1 steps missing from 2 on"]),
        (replace(CLEAN, samples=192), ["192 samples were consumed, not 128"]),
        (replace(CLEAN, state={"model.w": "d" * 64}), ["1 tensors of the last checkpoint differ (model.w)"]),
    ],
)
def test_what_differs_from_the_clean_run_is_said(trace: Trace, said: list[str]) -> None:
    assert differences(trace, CLEAN) == said


# played for real

LINKED = (
    *("resources.nodes=2", "model.widths=[4]", "model.hidden=16", "train.microbatches=4", "train.steps=400"),
    "checkpoint.every=20",
)
JOB = (*LINKED, "recovery.stall=5s")
APART = 60  # steps: faults that whoever plays them is late with must not happen as one


def test_whatever_is_killed_the_run_comes_out_the_same(sandbox: Sandbox) -> None:
    # after the driver's death three failures are blamed on the machine, and there is no other
    kinds = ("persister:rank=0", "driver", "kill:rank=1", "segv:rank=0", "term:rank=1", "node:node=1")
    at = [APART * number for number in range(1, len(kinds) + 1)]
    faults = ", ".join(f"{kind}@step={step}" for kind, step in zip(kinds, at, strict=True))
    steps = at[-1] + 2 * APART
    done = sandbox.run("chaos", *LINKED, f"train.steps={steps}", "--json", "--faults", faults, timeout=LIMIT)
    assert done.returncode == 0, done.stderr + done.stdout
    answer = json.loads(done.stdout)
    (schedule,) = answer["schedules"]
    assert (answer["ranks"], answer["steps"], answer["identical"]) == (2, steps, 1)
    assert [one["fault"] for one in schedule["played"]] == [str(fault) for fault in parse_faults(faults)]
    assert all(one["steps_done"] >= step for one, step in zip(schedule["played"], at, strict=True))
    assert schedule["played"][2]["seconds_to_new_step"] > 0
    assert schedule["starts"] == 6


RECIPE = """
    import dltrain
    from dltrain.models.cnn import CnnRecipe

    class Forgets(CnnRecipe):
        def loss(self, part, parts, batch):
            return super().loss(part, parts, batch) * (1 + dltrain.context().restart)
"""


@pytest.mark.slow
def test_a_run_that_comes_out_otherwise_is_told_and_kept(sandbox: Sandbox) -> None:
    (sandbox.folder / "forgets.py").write_text(dedent(RECIPE), encoding="utf-8")
    done = sandbox.run("chaos", *JOB, "recipe=forgets:Forgets", "--faults", "stop:rank=0@step=60", timeout=LIMIT)
    assert done.returncode == 1, done.stderr + done.stdout
    assert "NOT IDENTICAL; 2 starts of the ranks" in done.stdout
    assert re.search(r"weights are \w{12}, not \w{12}", done.stdout)
    assert "metrics differ from step" in done.stdout
    assert "0 of 1 identical" in done.stdout
    kept = re.search(r"kept in (\S+);", done.stdout)
    assert kept
    folder = Path(kept[1])
    assert (folder / "command").read_text().count(" launch ") == 1
    assert len(list(folder.glob("runs/*/0001/failures/*.txt"))) == 1
    shutil.rmtree(folder.parent)


@pytest.mark.slow
def test_a_job_that_fails_by_itself_leaves_its_report(sandbox: Sandbox) -> None:
    done = sandbox.run("chaos", *JOB, "train.optimizer.lr=1e30", "--faults", "kill:rank=0@60", timeout=LIMIT)
    assert (done.returncode, "the job fails without any fault" in done.stderr) == (1, True), done.stderr
    report = re.search(r"report: (\S+)", done.stderr)
    assert report
    assert Path(report[1]).exists()
    shutil.rmtree(next(sandbox.temporary.glob("dltrain-chaos-*")))


HANGS = """
    import itertools
    import threading
    from dltrain.models.cnn import CnnRecipe

    calls = itertools.count()

    class Hangs(CnnRecipe):
        def loss(self, part, parts, batch):
            if next(calls) == 10:  # a rank has two microbatches in a step
                threading.Event().wait()
            return super().loss(part, parts, batch)
"""


@pytest.mark.slow
def test_a_clean_run_that_hangs_is_ended_and_told(sandbox: Sandbox) -> None:
    (sandbox.folder / "hangs.py").write_text(dedent(HANGS), encoding="utf-8")
    patience = ("recovery.stall=never", "recovery.stall_at_start=1s", "recovery.start_timeout=15s")
    done = sandbox.run("chaos", *JOB, *patience, "recipe=hangs:Hangs", "--faults", "kill:rank=0@60")
    assert done.returncode == 1, done.stderr + done.stdout
    assert "the job hangs without any fault: after 5 of 400 steps it did no other for 31 s" in done.stderr
    shutil.rmtree(next(sandbox.temporary.glob("dltrain-chaos-*")))


@pytest.mark.slow
def test_a_fault_that_comes_too_late_is_no_success(sandbox: Sandbox) -> None:
    cores = ("resources.nproc_per_node=cpu", "train.microbatches=auto")
    done = sandbox.run("chaos", *JOB, *cores, "--json", "--faults", "kill:rank=0@999s", timeout=LIMIT)
    assert done.returncode == 1, done.stderr + done.stdout
    answer = json.loads(done.stdout)
    (schedule,) = answer["schedules"]
    assert schedule["wrong"] == ["kill:rank=0@999s never happened: the run was over before"]
    manifests = Path(schedule["folder"]).glob("runs/*/0001/checkpoints/step-*/manifest.json")
    assert {json.loads(path.read_text())["world"] for path in manifests} == {answer["ranks"]}
    shutil.rmtree(next(sandbox.temporary.glob("dltrain-chaos-*")))


MAKER = """
    import subprocess, time
    from dltrain.launcher.chaos.machines import machines

    with machines(1) as (machine,):
        restless = "while sh -c :; do :; done"
        process = subprocess.Popen([*machine.prefix, "setsid", "sh", "-c", f"({restless}) & ({restless}) & {restless}"])
        while len(machine.processes()) < 4:
            time.sleep(0.01)
        machine.cut()
        print(machine.pid, process.pid, flush=True)
        time.sleep(1000)
"""


def test_machines_end_with_what_runs_on_them_when_their_maker_is_killed() -> None:
    if reason := why_not():
        pytest.skip(reason)
    with subprocess.Popen([sys.executable, "-c", dedent(MAKER)], stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        left = {pid: Process.of(int(pid)) for pid in maker.stdout.readline().split()}
        assert all(process is not None and process.alive for process in left.values())
        maker.kill()
    wait_for(
        lambda: not any(process and process.alive for process in left.values()), what="its machine to end", timeout=10
    )


@pytest.mark.campaign
@pytest.mark.timeout(1000)
def test_a_short_partition_is_sat_out_and_after_a_long_one_another_machine_goes_on(sandbox: Sandbox) -> None:
    if reason := why_not():
        pytest.skip(reason)
    faults = "partition:node=1@60/1s, partition:node=0@200/20s"
    done = sandbox.run("chaos", *LINKED, "--json", "--faults", faults, timeout=900)
    assert done.returncode == 0, done.stderr + done.stdout
    (schedule,) = json.loads(done.stdout)["schedules"]
    short, long = schedule["played"]
    assert short["seconds_to_new_step"] is None
    assert long["seconds_to_new_step"] > 3
    assert schedule["starts"] == 2
