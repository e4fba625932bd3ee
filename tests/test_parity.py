"""Every built-in model under every way to spread it: the numbers of one plain process. docs/parity.md has them all."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import CELLS, Cell, measure


@pytest.mark.parametrize(
    ("cell", "job"),
    [
        pytest.param(cell, job, id=f"{cell.name}, {job}", marks=[pytest.mark.slow] if cell.ranks > 2 else [])
        for cell in CELLS
        for job in cell.jobs
    ],
)
def test_a_spread_job_computes_what_one_plain_process_does(cell: Cell, job: str, tmp_path: Path) -> None:
    apart = measure(job, cell, tmp_path)
    assert apart.loss < 1e-5
    assert apart.norm < 1e-4
    assert apart.weight < 1e-4
