"""Where a run's time went."""

from __future__ import annotations

import pytest
from dltrain.core.rows import RunRow
from dltrain.launcher.goodput import Goodput


def row(step: int, at: float) -> RunRow:
    """A row of one step, which took 1 s, a quarter of it waiting for data."""
    return RunRow(step, at, {}, 1, 0.75, 0.25)


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
    goodput.take(row(5, 139.0))  # an evaluation of 2 s before
    shares = goodput.shares(140.0)
    assert shares == {
        "steps": 5 * 0.75,
        "start-up": 10.0,
        "data wait": 5 * 0.25,
        "evaluation and checkpoints": 2.0,
        "restarts": 20.0 + 2.0,
        "end": 1.0,
    }
    assert sum(shares.values()) == 40.0
    assert goodput.ratio(140.0) == pytest.approx(3.75 / 40)
