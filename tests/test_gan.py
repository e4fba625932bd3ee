"""The GAN against a plain PyTorch loop written out here, on any number of ranks; and the pictures that it draws."""

from __future__ import annotations

import math
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from dltrain.core.errors import JobError
from dltrain.core.job import Job, Split
from dltrain.core.keys import derive
from dltrain.data.order import Order
from dltrain.data.split import split
from dltrain.strategies.build import check_parts
from dltrain.training.images import grid, png
from dltrain.training.recipes import load_recipe
from launching import Sandbox
from ranks import train_ranks
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import logsigmoid

EXAMPLES = Path(__file__).parent.parent / "examples"
SEED, BATCH, MICROBATCHES, STEPS, RATE, LATENT = 5, 32, 4, 25, 1e-3, 8
JOB = (
    *("recipe=gan", f"seed={SEED}", f"train.global_batch={BATCH}", f"train.microbatches={MICROBATCHES}"),
    *(f"train.steps={STEPS}", f"train.optimizer.lr={RATE}", "train.optimizer.betas=[0.5, 0.9]", "train.clip_norm=5"),
    *("train.schedule.name=constant", f"model.latent={LATENT}", "model.width=8", "train.evaluate_every=10"),
    *("train.parts.generator.every=2", "train.parts.generator.lr=0.003"),
)


def networks() -> tuple[nn.Module, nn.Module]:
    """Discriminator and generator as ``models/gan.py`` documents them, made in the same order."""
    torch.manual_seed(derive(SEED, "weights"))
    discriminator = nn.Sequential(
        *(nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 8, 4, 2, 1), nn.GroupNorm(1, 8)),
        *(nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(32, 1)),
    )
    generator = nn.Sequential(
        *(nn.Linear(LATENT, 32), nn.Unflatten(1, (8, 2, 2)), nn.GroupNorm(1, 8), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.GroupNorm(1, 4), nn.ReLU(), nn.ConvTranspose2d(4, 1, 4, 2, 1)),
    )
    return discriminator, generator


@cache
def plain(wasserstein: bool) -> tuple[list[float], list[float]]:
    """Losses of the discriminator in every step and of the generator in every second, from one process."""
    images = load_digits().images
    train = np.asarray(split(len(images), Split())["train"])
    pixels = images[train] / 16
    x = ((torch.tensor(images / 16, dtype=torch.float32) - pixels.mean()) / pixels.std()).unsqueeze(1)
    critic, generator = networks()
    critics = torch.optim.AdamW(critic.parameters(), lr=RATE, betas=(0.5, 0.9), weight_decay=0)
    makers = torch.optim.AdamW(generator.parameters(), lr=0.003, betas=(0.5, 0.9), weight_decay=0)
    order = Order(len(train), SEED)
    of_critic: list[float] = []
    of_generator: list[float] = []
    for step in range(STEPS):
        picked = train[order.indices(step * BATCH, (step + 1) * BATCH)]
        batches = [x[part] for part in np.array_split(picked, MICROBATCHES)]
        critics.zero_grad()
        total = 0.0
        for index, real in enumerate(batches):
            torch.manual_seed(derive(SEED, "step", step, index, 0))
            fake = generator(torch.randn(len(real), LATENT)).detach()
            if wasserstein:
                share = torch.rand(len(real), 1, 1, 1)
                between = (real + share * (fake - real)).requires_grad_()
                (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
                penalty = ((slope.square().sum(dim=(1, 2, 3)).sqrt() - 1) ** 2).mean()
                loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
            else:
                loss = -logsigmoid(critic(real)).mean() - torch.log(1 - torch.sigmoid(critic(fake))).mean()
            (loss / MICROBATCHES).backward()
            total += loss.item() / MICROBATCHES
        nn.utils.clip_grad_norm_(critic.parameters(), 5)
        critics.step()
        of_critic.append(total)
        if step % 2:
            continue
        makers.zero_grad()
        total = 0.0
        for index, real in enumerate(batches):
            torch.manual_seed(derive(SEED, "step", step, index, 1))
            score = critic(generator(torch.randn(len(real), LATENT)))
            loss = -score.mean() if wasserstein else -logsigmoid(score).mean()
            (loss / MICROBATCHES).backward()
            total += loss.item() / MICROBATCHES
        nn.utils.clip_grad_norm_(generator.parameters(), 5)
        makers.step()
        of_generator.append(total)
    return of_critic, of_generator


@pytest.mark.parametrize("kind", ["non_saturating", "wasserstein"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_both_parts_learn_as_in_a_plain_loop(tmp_path: Path, ranks: int, kind: str) -> None:
    rows = train_ranks(tmp_path, ranks, *JOB, f"model.loss={kind}").rows()
    of_critic, of_generator = plain(kind == "wasserstein")
    torch.testing.assert_close([row["train/discriminator/loss"] for row in rows], of_critic, rtol=1e-4, atol=1e-5)
    drawn = [row["train/generator/loss"] for row in rows if "train/generator/loss" in row]
    torch.testing.assert_close(drawn, of_generator, rtol=1e-4, atol=1e-5)


def test_metrics_and_pictures_are_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    figures, pictures = [], []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run = train_ranks(folder, ranks, *JOB)
        figures.append([row["val/energy_distance"] for row in run.rows() if "val/energy_distance" in row])
        pictures.append({path.name for path in (run.path / "samples").iterdir()})
    torch.testing.assert_close(figures[0], figures[1], rtol=1e-4, atol=1e-5)
    names = {f"step-{step:08d}-generator.png" for step in (10, 20, STEPS)}
    assert pictures == [names, names]


def test_a_launch_shows_samples_on_its_report(sandbox: Sandbox) -> None:
    job = ("recipe=gan", "train.steps=20", "train.evaluate_every=5", "tracking.wandb.mode=disabled")
    done = sandbox.run("launch", "--nproc-per-node", "2", *job)
    assert done.returncode == 0, done.stderr
    run = sandbox.folder / "runs/digits/latest"
    assert len(list((run / "samples").glob("step-*-generator.png"))) == 4
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4
    assert "generator after step 20" in page
    assert "test/energy_distance" in done.stdout
    scored = sandbox.run(str(EXAMPLES / "gan_score.py"), str(run), command="python")
    assert scored.returncode == 0, scored.stderr
    assert [line.split(":")[0] for line in scored.stdout.splitlines()] == ["real", "made"]


def test_rows_of_numbers_have_a_gan_too(tmp_path: Path) -> None:
    table = "import numpy as np\ndef rows():\n    return {'x': np.random.default_rng(0).normal(size=(2000, 3))"
    (tmp_path / "table.py").write_text(table + ".astype('float32')}\n", encoding="utf-8")
    job = ("recipe=gan", "model.kind=mlp", "model.features=3", "data.source=table:rows", "train.steps=600")
    rows = train_ranks(
        tmp_path, 1, *job, "model.loss=wasserstein", "train.optimizer.betas=[0.5, 0.9]", "train.evaluate_every=50"
    ).rows()
    distance = [row["val/energy_distance"] for row in rows if "val/energy_distance" in row]
    assert distance[-1] < 0.5 * distance[0]


@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero3"])
def test_the_gradient_penalty_is_refused_where_weights_are_cut(strategy: str) -> None:
    job = Job.model_validate({"recipe": "gan", "model": {"loss": "wasserstein"}, "parallel": {"strategy": strategy}})
    recipe = load_recipe(job)
    with pytest.raises(JobError, match=r"parallel: the loss of part 'discriminator' differentiates through gradients"):
        check_parts(job, recipe, recipe.parts())


# ---- pictures


def pixels(file: bytes) -> torch.Tensor:
    """A PNG file's pixels ``[height, width, channels]``, checksums checked; for files without filters."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(file):
        (size,) = struct.unpack(">I", file[place : place + 4])
        name, data = file[place + 4 : place + 8], file[place + 8 : place + 8 + size]
        assert struct.unpack(">I", file[place + 8 + size : place + 12 + size]) == (zlib.crc32(name + data),)
        chunks[name], place = data, place + 12 + size
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert depth == 8
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    return torch.tensor(lines[:, 1:].reshape(height, width, {0: 1, 2: 3}[kind]))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_holds_every_image_in_its_place(channels: int) -> None:
    images = torch.randn(5, channels, 4, 6)
    images[0, 0, 0, 0], images[4, 0, 3, 5] = -9.0, 9.0
    shown = pixels(png(grid(images)))
    assert shown.shape == (2 * 5 - 1, 3 * 7 - 1, channels)
    expected = ((images + 9) / 18 * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    for index in range(5):
        top, left = index // 3 * 5, index % 3 * 7
        assert torch.equal(shown[top : top + 4, left : left + 6], expected[index])
    assert not shown[4].any()
    assert not shown[5:, 14:].any()


def test_images_of_one_value_or_with_nan_are_drawn() -> None:
    assert pixels(png(grid(torch.full((2, 1, 3, 3), 7.0)))).max() == 0
    assert pixels(png(grid(torch.tensor([math.nan, 0.0, 1.0, 1.0]).view(1, 1, 2, 2)))).flatten().tolist() == [
        *(0, 0, 255, 255)
    ]


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 2, 4, 4), (0, 1, 4, 4)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"samples must be images \[n, 1 or 3 channels, height, width\], not"):
        grid(torch.zeros(shape))
