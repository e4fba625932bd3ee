"""The job files in examples/: they are jobs, their recipes and data build, and the CNN's reaches what it is said to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from dltrain.core.config import load_job
from dltrain.models.registry import RECIPES
from dltrain.training.check import check_job
from ranks import train_ranks
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).parent.parent / "examples"
JOBS = sorted(path.stem for path in (EXAMPLES / "jobs").glob("*.yaml"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "language_model" else n for n in JOBS]
)
def test_it_passes_the_checks_before_a_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the check adds the working directory
    job = load_job(EXAMPLES / "jobs" / f"{name}.yaml", recipes=RECIPES).job
    assert check_job(job.model_dump(mode="json")) == []


def test_they_show_every_recipe() -> None:
    shown = {load_job(EXAMPLES / "jobs" / f"{name}.yaml").job.recipe for name in JOBS}
    assert shown == set(RECIPES)


def test_the_seasonal_naive_forecast_repeats_the_last_line() -> None:
    """Over all digits it errs about as much as over those of the test part."""
    command = [sys.executable, EXAMPLES / "baselines.py", EXAMPLES / "jobs" / "forecast.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    images = load_digits().images
    everywhere = abs(images[:, 7] - images[:, 6]).mean()
    assert "on 174 windows" in done.stdout
    assert float(done.stdout.split()[-1]) == pytest.approx(everywhere, rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cnn_reads_985_of_1000_digits(tmp_path: Path) -> None:
    run = train_ranks(tmp_path, 2, str(EXAMPLES / "jobs" / "cnn.yaml"), "tracking.wandb.mode=disabled", timeout=800)
    assert run.rows()[-1]["test/accuracy"] >= 0.985
