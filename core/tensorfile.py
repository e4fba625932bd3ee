"""The safetensors file format, as far as writing a file piece by piece needs it. No torch.

The library's ``serialize`` wants every tensor in memory and writes local files only; a stream needs just the header.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Bytes per element by the format's dtype code.
ITEMSIZE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this dtype code and shape."""
    return math.prod(shape) * ITEMSIZE[dtype]


@dataclass(frozen=True)
class Item:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def order(item: Item) -> tuple[int, str]:
    """Sort key that puts every tensor at a multiple of its element's size: wide elements first."""
    return -ITEMSIZE[item.dtype], item.name


def header(items: Sequence[Item], metadata: Mapping[str, str] | None = None) -> bytes:
    """The file's bytes up to the first tensor; the tensors follow in the order given, without gaps.

    Args:
        metadata: texts for readers, beside the mark that torch's loaders look for.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for item in items:
        begin, end = end, end + nbytes(item.dtype, item.shape)
        table[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [begin, end]}
    if len(table) != len(items) + 1:
        raise ValueError("two tensors of a safetensors file have one name")
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
