"""Measure every cell of the parity matrix and write docs/parity.md.

python docs/generate_parity.py
"""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path

import torch

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from parity import CELLS, JOBS, measure  # noqa: E402

HEAD = """# Parity

Every built-in model under every way to spread it, against one process with a plain PyTorch loop (`tests/plain.py`): 24
optimizer steps with four microbatches, dropout where the model has it, clipping, weight decay, warm-up and a cosine,
in float32. A cell has the largest relative difference of any step's loss, and the largest difference of any final
weight. `tests/test_parity.py` holds losses within 1e-5 and weights within 1e-4.

Written by `python docs/generate_parity.py`, with torch {torch} on {machine}.

"""


def main() -> None:
    lines = [f"| | {' | '.join(JOBS)} |", f"|---|{'---|' * len(JOBS)}"]
    for cell in CELLS:
        figures: list[str] = []
        for job in JOBS:
            if job not in cell.jobs:
                figures.append("–")
                continue
            with tempfile.TemporaryDirectory() as folder:
                apart = measure(job, cell, Path(folder))
            figures.append(f"{apart.loss:.0e}, {apart.weight:.0e}")
            print(f"{cell.name}, {job}: {figures[-1]}", flush=True)
        lines.append(f"| {cell.name} | {' | '.join(figures)} |")
    head = HEAD.format(torch=torch.__version__, machine=platform.machine())
    (DOCS / "parity.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
