"""The main job through the front door."""

from __future__ import annotations

import json

from launching import Sandbox


def test_the_built_in_job_learns_digits_on_two_nodes(sandbox: Sandbox) -> None:
    done = sandbox.run("launch", "--nodes", "2", "train.epochs=12")
    assert done.returncode == 0, done.stderr
    assert "no job file: this is the built-in digits job" in done.stderr
    run = sandbox.folder / "runs/digits/0001"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["test/accuracy"] >= 0.97
    present = {path.name for path in run.iterdir()}
    assert present >= {
        "job.yaml",
        "environment.json",
        "metrics.jsonl",
        "logs",
        "wandb",
        "weights.safetensors",
        "report.html",
    }
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert "runs/digits/0001" in done.stdout
