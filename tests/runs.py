"""What a run left in its directory, for tests that compare runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dltrain.checkpoint.export import export_weights
from dltrain.checkpoint.reader import open_manifest
from dltrain.core.storage import Storage

_NUMBERS = ("train/loss", "train/grad_norm", "train/lr", "train/epoch", "val/", "test/")


@dataclass(frozen=True)
class RunFolder:
    """A run directory."""

    path: Path

    def rows(self) -> list[dict[str, Any]]:
        record = self.path / "run.json"
        running = record.exists() and self.record()["state"] == "running"  # asked first: a row may just be written then
        whole, _, begun = (self.path / "metrics.jsonl").read_text().rpartition("\n")
        assert running or not begun, f"the run is over, and its last row is torn: {begun}"
        return [json.loads(line) for line in whole.splitlines()]

    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows()]

    def numbers(self) -> list[dict[str, Any]]:
        """The rows without what is measured in seconds: equal for runs that computed the same."""
        return [
            {name: value for name, value in row.items() if name == "step" or name.startswith(_NUMBERS)}
            for row in self.rows()
        ]

    def losses(self) -> list[float]:
        return [row["train/loss"] for row in self.rows()]

    def export(self) -> None:
        """Write the final weights, as a launcher does at the end."""
        storage = Storage(str(self.path / "checkpoints"))
        export_weights(storage, open_manifest(storage, self.checkpoints()[-1]), self.path / "weights.safetensors")

    def weights(self) -> str:
        """sha256 of the final weights."""
        return hashlib.sha256((self.path / "weights.safetensors").read_bytes()).hexdigest()

    def costs(self) -> list[dict[str, Any]]:
        """What each failure has cost, in their order."""
        return [json.loads(path.read_text())["cost"] for path in sorted((self.path / "failures").glob("*.json"))]

    def record(self) -> dict[str, Any]:
        return json.loads((self.path / "run.json").read_text())

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints."""
        return sorted(int(path.parent.name[5:]) for path in self.path.glob("checkpoints/step-*/manifest.json"))
