"""Where a run's time went."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dltrain.core.rows import RunRow, unbroken
from dltrain.launcher.goodput import Goodput
from dltrain.launcher.stragglers import Stragglers


def row(step: int, at: float) -> RunRow:
    """A row of one step, which took 1 s, a quarter of it waiting for data, and an eighth for the slower rank."""
    return RunRow(step, at, {}, 1, 0.75, 0.25, own=(0.25, 0.5))


def test_before_the_first_step_all_is_start_up() -> None:
    goodput = Goodput(100.0)
    assert goodput.shares(107.0) == {"start-up": 7.0}
    assert goodput.ratio(107.0) == 0


def test_what_a_failure_costs_is_no_progress() -> None:
    goodput = Goodput(100.0)
    for step, at in ((1, 111.0), (2, 112.0), (3, 113.0)):
        goodput.take(row(step, at))
    goodput.restart()  # a failure; the checkpoint was of step 1, and the next step begins 20 s later
    goodput.take(row(2, 134.0), again=True)
    goodput.take(row(3, 135.0), again=True)
    goodput.take(row(4, 136.0))
    goodput.take(replace(row(5, 139.0), evaluate=1.25, checkpoint=0.5))  # of the 2 s before
    goodput.end(evaluate=0.25, checkpoint=0.125)
    shares = goodput.shares(140.0)
    assert shares == {
        "steps": 5 * 0.625,
        "start-up": 10.0,
        "data wait": 5 * 0.25,
        "straggler wait": 5 * 0.125,
        "evaluation": 1.5,
        "checkpoint stall": 0.625,
        "recovery": 20.0 + 2.0,
        "end": 0.625,
        "other": 0.25,
    }
    assert sum(shares.values()) == 40.0
    assert goodput.ratio(140.0) == pytest.approx(5 * 0.625 / 40)


def test_ranks_that_are_slower_than_the_others_are_named() -> None:
    stragglers = Stragglers()
    for step in range(60):
        assert stragglers.found() == {} or step > 49
        stragglers.take(RunRow(step, 0.0, {}, 1, 1.0, 0.0, own=(0.5, 0.52, 0.5, 0.59)))
    assert stragglers.words(ranks_per_node=2) == ("rank 3 on node 1: 16% slower than the median",)
    stragglers.take(RunRow(60, 0.0, {}, 1, 1.0, 0.0, own=(0.5, 0.9)))  # fewer ranks: another start
    assert stragglers.found() == {}


def test_rows_behind_one_that_is_missing_are_not_taken() -> None:
    def row(step: int, steps: int = 1) -> RunRow:
        return RunRow(step, 0.0, {}, steps, 1.0, 0.0)

    assert unbroken([row(6), row(5), row(8)], 4) == [row(5), row(6)]
    assert unbroken([row(6)], 4) == []
    assert unbroken([row(20, 10), row(30, 10)], 10) == [row(20, 10), row(30, 10)]
    assert unbroken([row(50, 3)], 48) == [row(50, 3)]  # ranks that began in between
