"""Ranks that stand still: noticed, told from those that wait for them, shown with their stacks, and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
from dltrain.core.processes import Process
from dltrain.core.rows import RunRow
from dltrain.launcher.messages import RankBeat
from dltrain.launcher.stacks import Look, Sheet, look_at
from dltrain.launcher.stall import Place, StallWatch, stalled, tell_stall
from launching import Sandbox, wait_for
from runs import RunFolder
from stage import JOB, LAUNCH, assert_same_run, gate, put_recipe, run_of, wait_at_gate

HERE = Place(rank=0, node=0, step=25, phase="forward", still=9.0, limit=5.0)
AHEAD = replace(HERE, rank=1, node=1, phase="backward", still=8.0)
BUSY = Look("S", 'Current thread 0x1 (most recent call first):\n  File "/home/me/recipe.py", line 9 in loss\n')
WAITS = Look(
    "S",
    'Thread 0x2 (most recent call first):\n  File "/lib/threading.py", line 1 in wait\n\n'
    'Current thread 0x1 (most recent call first):\n  File "/lib/torch/autograd/graph.py", line 8 in _engine\n',
)
IN_COLLECTIVE = Look(
    "S",
    'Current thread 0x1 (most recent call first):\n  File "/lib/torch/nn/f.py", line 8 in f\n'
    '  File "/lib/torch/distributed/c10d.py", line 8 in all_reduce\n  File "/home/me/recipe.py", line 9 in loss\n',
)
STOPPED = Look("T")


# ---- when it is a stall, and whose


@pytest.mark.parametrize(
    ("places", "held_up"),
    [
        ((), []),
        ((HERE, AHEAD), [0]),
        ((replace(HERE, still=5.0), AHEAD), []),  # those ahead wait for it, but it still has time
        ((replace(HERE, step=26), AHEAD), [1]),  # a step behind is behind, whatever the phase
        ((HERE, replace(HERE, rank=1)), [0, 1]),
        ((HERE, replace(HERE, rank=1, still=0.0)), []),  # one that is as far behind moves
        ((HERE, replace(HERE, rank=1, step=24, limit=float("inf"))), []),  # still compiling, say
    ],
)
def test_a_stall_is_that_of_those_furthest_behind(places: Sequence[Place], held_up: list[int]) -> None:
    assert [place.rank for place in stalled(places)] == held_up


@pytest.mark.parametrize(
    ("places", "looks", "culprits"),
    [
        ((HERE, AHEAD), {0: BUSY, 1: WAITS}, [0]),
        ((HERE, AHEAD), {0: WAITS, 1: WAITS}, [0]),  # in the wrong collective
        ((HERE, AHEAD), {}, [0]),
        ((HERE, AHEAD), {0: WAITS, 1: STOPPED}, [1]),  # stopped for certain
        ((HERE, replace(HERE, rank=1)), {0: IN_COLLECTIVE, 1: BUSY}, [1]),
        ((HERE, replace(HERE, rank=1)), {0: BUSY, 1: BUSY}, [0, 1]),  # both in a source that hangs, say
        ((HERE, replace(HERE, rank=1)), {0: WAITS, 1: WAITS}, []),  # for each other
        ((HERE,), {0: WAITS}, [0]),
    ],
)
def test_who_waits_is_told_from_who_is_waited_for(
    places: Sequence[Place], looks: dict[int, Look], culprits: list[int]
) -> None:
    told = tell_stall(places, looks, now=100.0)
    assert [failure.rank for failure in told.stall.culprits] == culprits
    assert all(
        failure.at < 100 and failure.abrupt == (looks.get(failure.rank) == STOPPED) for failure in told.stall.culprits
    )


def limits(watch: StallWatch) -> list[float]:
    return [place.limit for place in watch.places()]


def beats(step: int, phase: str, age: float = 0.0) -> list[RankBeat]:
    return [RankBeat(0, step, phase, age)]


def test_limits_hold_once_a_rank_is_warm_and_grow_with_its_steps() -> None:
    tight, loose, never = StallWatch(4.0, 60.0), StallWatch("auto", 60.0), StallWatch("never", 60.0)
    for watch in (tight, loose, never):
        watch.take(0, beats(30, "forward", 8.0), -1.0)  # of the generation before, still on its way
        watch.row(RunRow(1, 0.0, {"train/step_seconds": 15.0}, 1, 15.0, 0.0))
        watch.take(0, beats(-1, "setup", 500.0), 0.0)
        watch.take(0, beats(10, "forward"), 1.0)
        watch.take(0, beats(11, "forward"), 2.0)
        assert limits(watch) == [float("inf") if watch is never else 60.0]
        watch.take(0, beats(12, "data"), 3.0)
    assert (limits(tight), limits(loose), limits(never)) == ([4.0], [150.0], [float("inf")])
    for phase, age in (("evaluate", 0.0), ("evaluate", 7.0), ("evaluate", 1.0)):
        tight.take(0, beats(12, phase, age), 4.0)
        assert limits(tight) == [60.0]  # the first evaluation
    tight.take(0, beats(13, "data"), 5.0)
    tight.take(0, beats(13, "evaluate"), 6.0)
    assert limits(tight) == [3 * 7.0]
    tight.take(0, [], 7.0)
    assert tight.places() == []  # it has ended


def test_a_later_start_has_limits_from_its_first_step_on() -> None:
    first = StallWatch(4.0, 60.0)
    for step, age in ((0, 0.0), (0, 3.0), (1, 0.0)):  # the first step compiles
        first.take(0, beats(step, "forward", age), step + age)
    half = StallWatch(4.0, 60.0, before=first)
    half.take(0, beats(0, "forward"), 0.0)
    assert limits(half) == [60.0]  # it was not seen to get through the second step
    for phase in ("data", "evaluate", "data"):
        first.take(0, beats(2, phase), 5.0)
    later = StallWatch(4.0, 60.0, before=first)
    for phase, limit in (("setup", 60.0), ("data", 4.0), ("forward", 3 * 3.0), ("evaluate", 4.0), ("checkpoint", 60.0)):
        later.take(0, beats(-1 if phase == "setup" else 7, phase), 0.0)
        assert limits(later) == [limit]
    third = StallWatch(4.0, 60.0, before=later)  # the second failed at once, and what is known is still known
    third.take(0, beats(7, "forward"), 0.0)
    assert limits(third) == [9.0]
    assert limits(StallWatch("never", 60.0, before=later)) == []


def standing(watch: StallWatch, phase: str, seconds: int) -> None:
    """Rank 0 goes through three steps, and stands still in ``phase`` of the last one."""
    for step in range(3):
        watch.take(0, beats(step, phase), float(step))
    for second in range(1, seconds + 1):
        watch.take(0, beats(2, phase, float(second)), 2.0 + second)


def test_a_rank_that_stands_still_is_told_of_soon_and_again_when_it_lasts() -> None:
    watch = StallWatch("auto", 60.0)
    for _ in range(99):
        watch.row(RunRow(1, 0.0, {"train/step_seconds": 0.5}, 1, 0.5, 0.0))
    watch.row(RunRow(1, 0.0, {"train/step_seconds": 9.0}, 1, 9.0, 0.0))  # the slowest in a hundred counts for nothing
    standing(watch, "forward", 2)
    assert watch.held_up() == []
    watch.take(0, beats(2, "forward", 3.0), 5.0)
    assert [place.still for place in watch.held_up()] == [3.0]
    assert watch.held_up() == []
    for second in range(6, 9):
        watch.take(0, beats(2, "forward", second - 2.0), float(second))
    assert [place.still for place in watch.held_up()] == [6.0]
    slow = StallWatch("auto", 60.0)
    slow.row(RunRow(1, 0.0, {"train/step_seconds": 2.0}, 1, 2.0, 0.0))
    standing(slow, "forward", 6)
    assert slow.held_up() == []
    script = StallWatch("never")
    standing(script, "user", 99)
    assert script.held_up() == []


def test_a_process_that_is_stopped_gets_less_time_until_it_goes_on() -> None:
    watch = StallWatch("auto", 60.0)
    standing(watch, "forward", 3)
    watch.learn({0: STOPPED})
    assert limits(watch) == [10.0]
    watch.take(0, beats(2, "backward"), 6.0)
    assert limits(watch) == [120.0]
    own = StallWatch(40.0)
    standing(own, "forward", 3)
    own.learn({0: STOPPED})
    assert limits(own) == [40.0]


def test_words_show_the_call_in_which_a_rank_stands_still() -> None:
    words = tell_stall((HERE, AHEAD), {0: BUSY, 1: WAITS}, now=100.0).words()
    assert words[0] == "rank 0 (node 0) has made no progress for 9.0 s, in forward, step 25"
    assert words[1:] == ['  File "/home/me/recipe.py", line 9 in loss']
    words = tell_stall((HERE, replace(HERE, rank=1)), {0: WAITS, 1: WAITS}, now=100.0).words()
    assert words[0].endswith("; it waits for others")


def test_only_time_that_was_watched_counts() -> None:
    watch = StallWatch(4.0)
    for step in range(3):
        watch.take(0, beats(step, "forward"), float(step))
    watch.take(0, beats(2, "forward", 600.0), 602.0)  # the whole machine was asleep
    assert watch.places()[0].still == 1.0
    for second in range(1, 5):
        watch.take(0, beats(2, "forward", 600.0 + second), 602.0 + second)
    assert [place.still for place in stalled(watch.places())] == [5.0]
    watch.take(0, beats(2, "forward", 0.1), 607.0)  # the next microbatch
    assert watch.places()[0].still == 0.0


# ---- stacks

CHILD = """
import sys, threading
from dltrain.launcher.stacks import answer
answer(int(sys.argv[1]))
print("there", flush=True)
def stand_still():
    sys.stdin.read()
threading.Thread(target=threading.Event().wait, daemon=True).start()
stand_still()
"""


def test_a_process_shows_its_stacks_again_and_again_unless_it_is_stopped() -> None:
    sheet = Sheet()
    command = [sys.executable, "-c", CHILD, str(sheet.fd)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[sheet.fd]
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "there\n"
            process = Process.of(child.pid)
            assert process is not None
            for _ in range(2):
                wait_for(lambda: "stand_still" in look_at({3: (process, sheet.fd)}, 60)[3].main, what="the stack")
            look = look_at({3: (process, sheet.fd)}, 60)[3]
            assert look.stacks.count("most recent call first") == 2
            assert re.fullmatch(
                r'  File "<string>", line 7 in stand_still\n  File "<string>", line 9 in <module>', look.main
            )
            assert not look.waits
            child.send_signal(signal.SIGSTOP)
            wait_for(lambda: process.state == "T", what="the stop")
            look = look_at({3: (process, sheet.fd)}, 60)[3]
            assert (look.stopped, look.stacks) == (True, "")
            assert "is stopped (SIGSTOP or the like)" in look.why_silent()
        finally:
            child.kill()
    sheet.close()


# ---- launches


@pytest.fixture
def box(sandbox: Sandbox) -> Sandbox:
    put_recipe(sandbox)
    return sandbox


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_comes_to_the_same_weights(box: Sandbox, reference: RunFolder) -> None:
    closed = gate(box)
    with box.start(*LAUNCH, *JOB) as process:
        wait_at_gate(box, process)
        (victim,) = box.named("dltrain-rank1")
        os.kill(victim, signal.SIGSTOP)
        closed.unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert re.search(r"rank 1 on node 1 made no progress for \d+ s, in forward at step 20: its process is stopped", out)
    assert re.search(r"rank 1 \(node 1\) has made no progress for \d\.\d s, in forward, step 20\n  its process is", out)
    assert "starting all ranks again from step 20, in the memory of 2 ranks; report: " in out
    assert_same_run(run_of(box), reference)
    text = (run_of(box).path / "failures/0000.txt").read_text()
    assert "First failure: rank 1, node 1" in text
    assert "phase: forward, step 20" in text
    assert re.search(r"Rank 0 waits in backward, step 20:\n  +File .*torch/", text), text
    assert re.search(r"It went on from step 20, in memory of 2 ranks: 0 steps done again, \d+\.\d s", text), text


@pytest.mark.slow
def test_a_rank_that_sleeps_for_ever_is_shown_with_its_stack(box: Sandbox) -> None:
    done = box.run(*LAUNCH, *JOB, "recovery.stall=5s", "model.sleep_at=25", "model.rank=0")
    assert done.returncode == 1
    assert re.search(r"rank 0 on node 0 made no progress for \d+ s, in forward at step 25\b", done.stderr), done.stderr
    assert re.search(r"rank 0 \(node 0\) has made no progress for .*\n  File .*staged\.py", done.stdout), done.stdout
    path = run_of(box).path / "failures/0000.txt"
    assert f"report: {path}" in done.stderr
    text = path.read_text()
    assert re.search(r'File ".*staged\.py", line \d+ in _act', text), text
    assert re.search(r"Rank 1 waits in backward, step 25:\n  +File .*torch/", text), text
    assert "Lost: 5 steps since the newest checkpoint, of step 20" in text
    report = json.loads(path.with_suffix(".json").read_text())
    assert [(rank["rank"], rank["phase"], rank["step"]) for rank in report["ranks"]] == [(0, "forward", 25)]
    assert [(at["rank"], at["phase"]) for at in report["stalled"]] == [(0, "forward"), (1, "backward")]


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_first_evaluation_is_ended_too(box: Sandbox) -> None:
    (box.folder / "hang").touch()
    first = ("model.hang_in_evaluation=true", "model.rank=1", "recovery.stall_at_start=12s")
    done = box.run(*LAUNCH, *JOB, *first)
    assert done.returncode == 1
    assert re.search(r"rank 1 on node 1 made no progress for \d+ s, in evaluate at step 6\b", done.stderr), done.stderr


SOURCE = """
import time
import dltrain, torch

class Sticks(torch.utils.data.Dataset):
    def __init__(self):
        self.served = 0
    def __len__(self):
        return 256
    def __getitem__(self, index):
        self.served += 1
        while self.served > 400 and dltrain.context().rank == 1:
            time.sleep(0.1)
        return {"x": torch.full((1, 8, 8), index / 256), "y": index % 10}
"""


@pytest.mark.slow
def test_a_source_that_sticks_is_named_with_the_stack_of_its_thread(box: Sandbox) -> None:
    (box.folder / "sticky.py").write_text(SOURCE, encoding="utf-8")
    source = ("data.source=sticky:Sticks", "data.normalize=false", "train.evaluate_every=1000", "checkpoint.every=null")
    done = box.run(*LAUNCH, *JOB, *source, "recovery.stall=5s")
    assert done.returncode == 1
    assert re.search(r"rank 1 on node 1 made no progress for \d+ s, in data at step \d+", done.stderr), done.stderr
    text = (run_of(box).path / "failures/0000.txt").read_text()
    assert re.search(r'File ".*sticky\.py", line \d+ in __getitem__', text), text
    assert "Rank 0 waits in backward" in text
    assert "steps, as there is no checkpoint" in text


@pytest.mark.slow
def test_a_rank_that_stalls_at_the_same_step_twice_is_not_tried_a_third_time(box: Sandbox) -> None:
    stall = ("recovery.stall=5s", "recovery.snapshot=1")  # it comes to step 25 again in the first step of its start
    done = box.run(*LAUNCH, *JOB, *stall, "model.sleep_at=25", "model.rank=0", "--max-restarts", "5")
    assert done.returncode == 1
    assert "the same as before, so another try would end alike" in done.stderr
    assert len(list((run_of(box).path / "failures").glob("*.txt"))) == 2
    assert "from step 25, in the memory of 2 ranks" in done.stdout
