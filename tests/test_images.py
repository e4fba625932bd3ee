"""Folders of images: what a batch holds, in which order, cut how; what is refused; a split that follows the files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dltrain.core.job import DataSpec
from dltrain.core.storage import Storage
from dltrain.data.sources import open_source
from PIL import Image
from sources import parts_of, refusal

DRAW = np.random.default_rng(0)


def picture(height: int = 6, width: int = 6, channels: int = 3) -> np.ndarray:
    return DRAW.integers(0, 256, size=(height, width, channels) if channels > 1 else (height, width), dtype=np.uint8)


def encoded(pixels: np.ndarray, format: str = "png", **options: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format, **options)
    return content.getvalue()


def test_images_of_the_right_size_keep_their_pixels(storage: Storage) -> None:
    pixels = [picture() for _ in range(4)]
    for name, image in zip(("dog/b.png", "cat/deep/x.PNG", "dog/a.png", "cat/b.png"), pixels, strict=True):
        storage.write(name, [encoded(image)])
    storage.write("dog/notes.md", [b"two dogs"])
    storage.write(".thumbnails/dog.png", [b""])
    source = open_source(DataSpec(source=str(storage), options={"size": 6}))
    assert len(source) == 4
    assert source.classes == ("cat", "dog")  # pyright: ignore[reportAttributeAccessIssue]  # an image source has classes
    got = source.fetch(np.array([3, 0, 2, 1]))
    expected = np.stack([pixels[0], pixels[3], pixels[2], pixels[1]]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    assert torch.equal(got["x"], torch.from_numpy(expected))
    assert (got["y"].dtype, got["y"].tolist()) == (torch.int64, [1, 0, 1, 0])


def test_other_sizes_are_scaled_and_the_middle_is_cut_out(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    grey = picture(40, 31, channels=1)
    (tmp_path / "a" / "0.png").write_bytes(encoded(grey))
    got = open_source(DataSpec(source=str(tmp_path), options={"size": 10, "channels": 1})).fetch(np.array([0]))
    scaled = np.asarray(Image.fromarray(grey).resize((10, 12), Image.Resampling.BILINEAR))
    assert torch.equal(got["x"], torch.from_numpy(scaled[None, None, 1:11].astype(np.float32)) / 255)


def test_a_turned_photo_is_set_upright_and_colours_are_converted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pixels = picture(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "a" / "0.png").write_bytes(encoded(pixels, exif=exif))
    (tmp_path / "a" / "1.png").write_bytes(encoded(picture(8, 8, channels=1)))
    got = open_source(DataSpec(source=str(tmp_path), options={"size": 8})).fetch(np.array([0, 1]))["x"]
    assert torch.equal(got[0], torch.from_numpy(pixels[::-1, ::-1].copy()).permute(2, 0, 1).float() / 255)
    assert torch.equal(got[1, 0], got[1, 2])


def test_the_order_of_classes_can_be_given_and_others_are_left_out(tmp_path: Path) -> None:
    for name in ("cat", "dog", "eel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encoded(picture()))
    source = open_source(DataSpec(source=str(tmp_path), options={"size": 6, "classes": ["eel", "cat"]}))
    assert source.fetch(np.arange(len(source)))["y"].tolist() == [1, 0]
    where, message = refusal(str(tmp_path), size=6, classes=["eel", "cart"])
    assert where == "data.options.classes"
    assert "no folder 'cart' (did you mean 'cat'?)" in message


def test_images_that_are_added_move_no_other(tmp_path: Path) -> None:
    def write(numbers: range) -> None:
        for i in numbers:
            image = np.zeros((2, 2), dtype=np.uint8)
            image[0] = divmod(i, 256)
            (tmp_path / f"{'ab'[i % 2]}").mkdir(exist_ok=True)
            (tmp_path / f"{'ab'[i % 2]}" / f"{i * 7919 % 1000:03d}.png").write_bytes(encoded(image))

    write(range(0, 300, 2))
    before = parts_of(str(tmp_path), size=2, channels=1)
    write(range(1, 300, 3))
    after = parts_of(str(tmp_path), size=2, channels=1)
    assert all(20 < len(part) < 110 for part in before.values())
    for name, part in before.items():
        pixels = [row["x"] for row in after[name]]
        assert not [row for row in part if row["x"] not in pixels]


@pytest.mark.parametrize(
    ("files", "options", "says"),
    [
        ({"a/0.png": b"junk"}, {"size": 6}, "0.png: cannot identify image file"),
        ({"a/0.png": encoded(picture())[:90]}, {"size": 6}, "a/0.png"),
        (
            {"a/0.png": encoded(DRAW.integers(0, 9999, size=(6, 6), dtype=np.uint16))},
            {"size": 6},
            "pixels are not bytes",
        ),
        ({"a/0.png": encoded(picture())}, {}, "data.options.size: is missing"),
        ({"a/0.png": encoded(picture())}, {"size": 6, "channels": 4}, "data.options.channels: expected 1 or 3"),
        ({"a/0.png": encoded(picture()), "0.png": b""}, {"size": 6}, "0.png' belongs to no class"),
        ({"train/a/0.png": b"", "val/a/0.png": b""}, {"size": 6}, "holds parts (train, val), not classes"),
    ],
)
def test_folders_that_are_refused(files: dict[str, bytes], options: dict[str, Any], says: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert says in refusal(str(tmp_path), **options)[1]


def test_one_image_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encoded(picture()))
    assert "is one file, not a folder of images" in refusal(str(tmp_path / "0.png"), size=6)[1]


def test_an_image_that_breaks_later_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "a" / name).write_bytes(encoded(picture()))
    source = open_source(DataSpec(source=str(tmp_path), options={"size": 6}))
    (tmp_path / "a" / "1.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"a/1\.png"):
        source.fetch(np.array([0, 1]))
