"""What a model has to beat: figures for the test part of a job's data that need no training.

    python examples/baselines.py examples/jobs/forecast.yaml
    python examples/baselines.py examples/jobs/language_model.yaml

Of a series: the mean absolute error of the seasonal-naive forecast, which repeats the last season. Of text: bits per
byte of ``xz -9`` on the text of the test part, as one file.
"""

import lzma
import sys
from pathlib import Path

import numpy as np
from dltrain.core.config import load_job
from dltrain.core.job import DataSpec
from dltrain.data.sources import open_source
from dltrain.data.split import split_source

SEASON = 8  # values in a line of 'digits_scan'


def main(path: str, *overrides: str) -> None:
    data = load_job(Path(path), overrides).job.data
    if data.source == "stdlib_text":
        text = held_out_text(data)
        bits = 8 * len(lzma.compress(text, preset=9)) / len(text)
        print(f"xz -9 on {len(text):,} bytes: {bits:.3f} bits per byte")
    else:
        source = open_source(data)
        fields = source.fetch(np.asarray(split_source(source, data.split)["test"]))
        y = fields["y"]
        error = np.resize(fields["x"][:, -SEASON:, 0].numpy().T, y.T.shape).T - y.numpy()
        print(f"seasonal-naive on {len(y)} windows: mean absolute error {np.abs(error).mean():.3f}")


def held_out_text(data: DataSpec) -> bytes:
    """All of the test part as bytes, which are the same text under every tokenizer."""
    source = open_source(data.model_copy(update={"options": {"length": 1}}))
    return bytes(source.fetch(np.asarray(split_source(source, data.split)["test"]))["y"].flatten().tolist())


main(*sys.argv[1:])
