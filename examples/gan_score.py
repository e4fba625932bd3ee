"""How real a GAN's digits are, by the judgement of a classifier that has seen real ones only.

    python examples/gan_score.py runs/digits-gan/latest

A support vector machine (98 to 99 % right on real test digits) says for how many of 2,000 made digits it is more than
90 % sure, and which digits they are; beside it the same of real digits that it has not seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from dltrain.core.document import parse_document
from dltrain.core.job import Job
from dltrain.models.gan import GanRecipe
from safetensors.torch import load_file
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC


def main(run: Path) -> None:
    job = Job.model_validate(parse_document((run / "job.yaml").read_text(), str(run / "job.yaml")).value)
    recipe = GanRecipe(**job.model)
    weights = load_file(run / "weights.safetensors")
    generator = recipe.parts()["generator"].eval()
    generator.load_state_dict(
        {k.removeprefix("generator."): v for k, v in weights.items() if k.startswith("generator.")}
    )
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels - pixels.mean()) / pixels.std()
    seen, unseen, of_seen, _ = train_test_split(pixels, labels, random_state=0)
    judge = CalibratedClassifierCV(SVC(), ensemble=False).fit(seen, of_seen)
    torch.manual_seed(0)
    with torch.inference_mode():
        made = generator(torch.randn(2000, recipe.config.latent)).flatten(1).numpy()
    for name, samples in (("real", unseen), ("made", made)):
        sure = judge.predict_proba(samples)
        share = np.bincount(sure.argmax(1), minlength=10) / len(samples)
        print(
            f"{name}: sure of {(sure.max(1) > 0.9).mean():.1%};", " ".join(f"{d}:{s:.0%}" for d, s in enumerate(share))
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
