"""Hashes of a checkpoint's pieces: ``<algorithm>:<hex>``, 256 bits. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from blake3 import blake3

from ..core.folders import Chunk

HEX = 64
"""Digits of a hash."""
#: What hashes in a manifest look like: those of a piece's blocks. SHA-256 is that of checkpoints of format 1.
PATTERN = r"^(blake3|sha256):([0-9a-f]{64})+$"


def digest(block: Chunk) -> str:
    """The hash that is written with a piece: BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs)."""
    return f"blake3:{blake3(block).hexdigest()}"


def digests(blocks: Iterable[Chunk]) -> str:
    """The hashes of a piece's blocks, one after the other behind the name of the algorithm."""
    return "blake3:" + "".join(blake3(block).hexdigest() for block in blocks)


def matches(block: Chunk, expected: str) -> bool:
    """Whether ``block`` is what ``expected`` is the hash of, by whichever algorithm it names."""
    match algorithm(expected):
        case "sha256":
            return hashlib.sha256(block).hexdigest() == expected.removeprefix("sha256:")
        case _:
            return digest(block) == expected


def algorithm(expected: str) -> str:
    """The name of the algorithm of a hash."""
    return expected.partition(":")[0]
