"""What a model has to beat: figures for the test part of a job's data that need no training.

    python examples/baselines.py examples/jobs/forecast.yaml
    python examples/baselines.py examples/jobs/language_model.yaml

Of a series: the mean absolute error of the seasonal-naive forecast, which repeats the last season. Of text: bits per
byte of ``xz -9`` on all the text that the test part's targets spell, as one file.
"""

import lzma
import sys
from pathlib import Path

import numpy as np
from dltrain.core.config import load_job
from dltrain.data.sources import open_source
from dltrain.data.split import split
from dltrain.data.stdlib_text import TokenWindows

SEASON = 8  # values in a line of 'digits_scan'


def main(path: str, *overrides: str) -> None:
    data = load_job(Path(path), overrides).job.data
    source = open_source(data)
    test = np.asarray(split(len(source), data.split)["test"])
    if isinstance(source, TokenWindows):
        text = b"".join(source.spell(int(index)) for index in test)
        bits = 8 * len(lzma.compress(text, preset=9)) / len(text)
        print(f"xz -9 on {len(text):,} bytes: {bits:.3f} bits per byte")
    else:
        fields = source.fetch(test)
        y = fields["y"]
        error = np.resize(fields["x"][:, -SEASON:, 0].numpy().T, y.T.shape).T - y.numpy()
        print(f"seasonal-naive on {len(test)} windows: mean absolute error {np.abs(error).mean():.3f}")


main(*sys.argv[1:])
