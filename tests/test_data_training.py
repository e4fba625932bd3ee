"""Jobs on users' files, trained by the rank program: tables, IDX, folders of images, a prepared corpus."""

from __future__ import annotations

import io
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from dltrain.core.job import Split
from dltrain.core.keys import derive
from dltrain.core.storage import Storage
from dltrain.data.order import Order
from dltrain.data.prepare import prepare
from PIL import Image
from ranks import train_ranks
from s3_server import S3Server
from sources import idx_file, parts_of
from torch import nn
from torch.nn import functional

QUIET = ("tracking.wandb.mode=disabled", "train.schedule.name=constant")


def recipe(folder: Path, body: str) -> None:
    """The user's ``mine.py``, with a recipe ``Mine`` of this ``parts`` and ``loss``."""
    head = "import dltrain\nfrom torch import nn\nfrom torch.nn import functional\n\n"
    (folder / "mine.py").write_text(head + dedent(body), encoding="utf-8")


LINEAR = """
    class Mine(dltrain.Recipe):
        def parts(self):
            return {"line": nn.Linear(3, 2)}
        def loss(self, part, parts, batch):
            return functional.cross_entropy(parts[part](batch["x"]), batch["y"])
"""


def test_a_csv_trains_as_plain_torch_does(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x = (draw.normal(size=(200, 3)) * [1, 100, 0.01] + [0, 50, 7]).round(5)
    lines = [f"{a},{b},{c},{'yes' if a + b / 100 > 1 else 'no'}" for a, b, c in x.tolist()]
    (tmp_path / "points.csv").write_text("a,b,c,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    recipe(tmp_path, LINEAR)
    job = ("recipe=mine:Mine", "data.source=points.csv", "train.steps=20", "train.global_batch=16", *QUIET)
    sgd = ("train.optimizer.name=sgd", "train.optimizer.momentum=0", "train.optimizer.lr=0.5", "train.microbatches=4")
    losses = train_ranks(tmp_path, 2, *job, *sgd).losses()

    rows = parts_of(str(tmp_path / "points.csv"), Split())["train"]
    inputs = torch.tensor([row["x"] for row in rows])
    inputs = ((inputs.double() - inputs.double().mean(0)) / inputs.double().std(0, correction=0)).float()
    labels = torch.tensor([row["y"] for row in rows])
    torch.manual_seed(derive(0, "weights"))
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected: list[float] = []
    for step in range(20):
        picked = torch.from_numpy(Order(len(rows), 0).indices(step * 16, step * 16 + 16))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs[picked]), labels[picked])
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert losses[-1] < 0.6 * losses[0]


def pictures(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey images of 8 × 8 pixels of two classes: bright on the left, or on the right."""
    draw = np.random.default_rng(1)
    labels = np.arange(n, dtype=np.uint8) % 2
    images = draw.integers(0, 120, size=(n, 8, 8), dtype=np.uint8)
    images[labels == 0, :, :4] += 100
    images[labels == 1, :, 4:] += 100
    return images, labels


CNN = ("model.widths=[4]", "model.hidden=8", "model.classes=2")


def test_the_cnn_learns_from_idx_files(tmp_path: Path) -> None:
    images, labels = pictures(300)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(idx_file(images))
    (tmp_path / "mnist" / "train-labels-idx1-ubyte").write_bytes(idx_file(labels))
    run = train_ranks(tmp_path, 1, "data.source=mnist", "train.optimizer.lr=0.01", "train.steps=60", *CNN, *QUIET)
    assert run.rows()[-1]["test/accuracy"] > 0.95


@pytest.fixture
def environment(s3: S3Server, bucket: str) -> dict[str, str]:
    """What a process needs in its environment to reach the test's S3 server."""
    return {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3.url,
    }


def test_a_folder_of_images_in_s3_trains_as_a_local_one(
    tmp_path: Path, bucket: str, environment: dict[str, str]
) -> None:
    images, labels = pictures(24)
    remote, local = Storage(f"s3://{bucket}/photos"), Storage(str(tmp_path / "photos"))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "png")
        for storage in (remote, local):
            storage.write(f"{('left', 'right')[label]}/{i:02d}.png", [content.getvalue()])
    short = ("train.steps=4", "train.global_batch=8", "train.microbatches=2", "data.normalize=false")
    job = ("data.options.size=8", "data.options.channels=1", *CNN, *short, *QUIET)
    (tmp_path / "near").mkdir()
    (tmp_path / "far").mkdir()
    near = train_ranks(tmp_path / "near", 2, "data.source=../photos", *job)
    far = train_ranks(tmp_path / "far", 2, f"data.source={remote}", "data.workers=1", *job, **environment)
    assert len(near.losses()) == 4
    assert near.numbers() == far.numbers()


NEXT = """
    class Mine(dltrain.Recipe):
        def parts(self):
            return {"bigram": nn.Embedding(256, 256)}
        def loss(self, part, parts, batch):
            return functional.cross_entropy(parts[part](batch["x"]).flatten(0, 1), batch["y"].flatten())
        def metrics(self, parts, batch):
            logits = parts["bigram"](batch["x"]).transpose(1, 2)
            return {"loss": functional.cross_entropy(logits, batch["y"], reduction="none").mean(1)}
"""


def test_a_prepared_corpus_trains_alike_on_any_number_of_ranks(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text("".join(draw.choice(["ab", "cd", "efg"], size=200)), encoding="utf-8")
    prepare([str(tmp_path)], str(tmp_path / "corpus.tokens"))
    job = ("recipe=mine:Mine", "data.source=../corpus.tokens", "data.options.length=32", "train.steps=25", *QUIET)
    more = ("train.global_batch=16", "train.microbatches=2", "train.optimizer.lr=0.3")
    runs = []
    for world in (1, 2):
        folder = tmp_path / f"on{world}"
        folder.mkdir()
        recipe(folder, NEXT)
        runs.append(train_ranks(folder, world, *job, *more))
    torch.testing.assert_close(runs[0].losses(), runs[1].losses(), rtol=1e-5, atol=1e-6)
    assert runs[0].rows()[-1]["val/loss"] < 1.2  # of 5.5 that a uniform guess costs
