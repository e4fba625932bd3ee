"""Keys for randomness: one number per purpose, derived from the job's seed."""

from __future__ import annotations

import hashlib
import struct


def derive(seed: int, purpose: str, *words: int) -> int:
    """A 63-bit key for ``purpose`` and ``words``, independent for each (BLAKE2b, RFC 7693).

    The same everywhere: it depends on no rank, machine, or interpreter.
    """
    digest = hashlib.blake2b(
        struct.pack(f"<{1 + len(words)}q", seed, *words), digest_size=8, person=purpose.encode()[:16]
    )
    return int.from_bytes(digest.digest(), "little") >> 1
