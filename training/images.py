"""Images as PNG files, without a library for it: the pixels are few and the format is plain."""

from __future__ import annotations

import math
import struct
import zlib

import torch
from torch import Tensor


def grid(images: Tensor) -> Tensor:
    """``[n, channels, height, width]`` floats of any range as one image: ``[channels, rows, columns]``, uint8.

    As square as it gets, a pixel of black between images; the lowest value becomes 0 and the highest 255.

    Raises:
        ValueError: another shape, or neither 1 nor 3 channels.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"samples must be images [n, 1 or 3 channels, height, width], not {list(images.shape)}")
    values = images.detach().float().cpu().nan_to_num()
    low, high = values.amin(), values.amax()
    scaled = ((values - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
    count, channels, height, width = scaled.shape
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    sheet = torch.zeros(channels, down * (height + 1) - 1, across * (width + 1) - 1, dtype=torch.uint8)
    for index, image in enumerate(scaled):
        top, left = index // across * (height + 1), index % across * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def png(image: Tensor) -> bytes:
    """A uint8 image ``[1 or 3, height, width]`` as a PNG file (W3C, Portable Network Graphics, third edition)."""
    channels, height, width = image.shape
    lines = image.permute(1, 2, 0).contiguous().numpy()
    raw = b"".join(b"\0" + line.tobytes() for line in lines)  # 0: the line is not filtered
    kind = {1: 0, 3: 2}[channels]  # grey, or RGB
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
