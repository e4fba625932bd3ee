"""Ranks that are started again after one was killed."""

from __future__ import annotations

import json
import re
from textwrap import dedent

from launching import Sandbox

RECIPE = """
    import os, signal
    import dltrain
    from torch import nn
    from torch.nn import functional

    class Dies(dltrain.Recipe):
        def parts(self):
            return {"net": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))}
        def loss(self, part, parts, batch):
            if (batch.step, batch.index, dltrain.context().restart) == (50, 1, 0):
                os.kill(os.getpid(), signal.SIGKILL)
            return functional.cross_entropy(parts[part](batch["x"]), batch["y"])
"""


def test_ranks_go_on_from_the_newest_checkpoint(sandbox: Sandbox) -> None:
    (sandbox.folder / "dies.py").write_text(dedent(RECIPE), encoding="utf-8")
    job = ("recipe=dies:Dies", "name=dies", "checkpoint.every=20", "train.steps=80", "recovery.snapshot=never")
    done = sandbox.run("launch", "--nodes", "2", "--max-restarts", "1", *job)
    assert done.returncode == 0, done.stderr
    assert "from step 40 to step 80" in done.stdout
    run = sandbox.folder / "runs/dies/0001"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 81))
    report = (run / "failures/0000.txt").read_text(encoding="utf-8")
    assert "rank 1 on node 1 failed with SIGKILL" in report
    assert "phase: forward, step 50" in report
    assert re.search(r"It went on from step 40, the newest checkpoint: 10 steps done again, \d+\.\d s", report), report
    assert re.search(r"went on from step 40.* 10 steps done again: .*/failures/0000.txt", done.stdout)
    cost = json.loads((run / "failures/0000.json").read_text(encoding="utf-8"))["cost"]
    assert (cost["from_step"], cost["steps"]) == (40, 10)
    assert {path.name for path in (run / "logs").iterdir()} == {"attempt-0", "attempt-1"}
