"""Every built-in model under every way to spread it: the numbers of one plain process. docs/parity.md has them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity import CELLS, Cell, measure
from ranks import train_ranks


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


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_number_of_ranks_changes_no_number(strategy: str, tmp_path: Path) -> None:
    job = ("model.widths=[8]", "model.hidden=16", "train.microbatches=8", "train.steps=25", "train.evaluate_every=10")
    runs = []
    for ranks in (1, 2, 4, 8):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        runs.append(train_ranks(folder, ranks, *job, f"parallel.strategy={strategy}").numbers())
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-5, atol=1e-7)
