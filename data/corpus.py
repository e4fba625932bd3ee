"""A corpus: tokens, where its documents end, and a key for every block of them, which the split goes by. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BLOCK = 4096
"""Tokens of a document that fall into the same part of the split; a document's last block may be shorter."""

FORMAT = "tokens-1"
"""What the metadata of a token file say under 'dltrain'."""


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens.

    Attributes:
        tokens: unsigned ``[tokens]``, all documents one after the other; may be mapped from a file.
        documents: int64 ``[documents + 1]``, where in ``tokens`` each begins, and the last ends.
        keys: uint64 ``[blocks]``, a hash of the tokens of each block, document by document.
        vocabulary_size: all tokens are below it.
        sizes: int64 ``[vocabulary_size]``, the bytes of text that each token stands for; None where each is one byte,
            or it is not known.

    Raises:
        ValueError: these do not fit each other.
    """

    tokens: np.ndarray
    documents: np.ndarray
    keys: np.ndarray
    vocabulary_size: int
    sizes: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.tokens.dtype.kind != "u":
            raise ValueError("its tokens are not one row of unsigned numbers")
        if not len(self.documents) or self.documents[0] != 0 or self.documents[-1] != len(self.tokens):
            raise ValueError("its documents do not cover its tokens")
        if (np.diff(self.documents) <= 0).any() or len(self.blocks()[0]) != len(self.keys):
            raise ValueError("its blocks do not fit its documents")
        if self.sizes is not None and self.sizes.shape != (self.vocabulary_size,):
            raise ValueError("its tokens' sizes do not fit its vocabulary")

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Where in ``tokens`` each block begins and ends: int64 ``[blocks]`` each."""
        counts = -(-np.diff(self.documents) // BLOCK)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(self.documents[:-1], counts) + number * BLOCK
        return starts, np.minimum(starts + BLOCK, np.repeat(self.documents[1:], counts))


class Collector:
    """Takes encoded pieces as they come: passes their bytes on, and keeps the documents' ends and the blocks' keys.

    Args:
        sink: gets the bytes of the pieces, in order.

    Attributes:
        tokens: taken so far.
    """

    def __init__(self, sink: Callable[[bytes], object]) -> None:
        self.tokens = 0
        self._sink = sink
        self._ends = [0]
        self._keys: list[bytes] = []
        self._open_block()

    def take(self, ids: np.ndarray, *, ends: bool) -> None:
        """Take a piece (unsigned ``[tokens]``, of the same dtype as all others); its document may end with it."""
        content = ids.tobytes()
        self._sink(content)
        begin = 0
        while begin < len(ids):
            stop = min(begin + self._room, len(ids))
            self._hash.update(content[begin * ids.itemsize : stop * ids.itemsize])
            self._room -= stop - begin
            begin = stop
            if not self._room:
                self._close_block()
        self.tokens += len(ids)
        if ends and self.tokens > self._ends[-1]:
            if self._room < BLOCK:
                self._close_block()
            self._ends.append(self.tokens)

    @property
    def documents(self) -> np.ndarray:
        """As :attr:`Corpus.documents`, of the documents that have ended."""
        return np.array(self._ends, dtype=np.int64)

    @property
    def keys(self) -> np.ndarray:
        """As :attr:`Corpus.keys`."""
        return np.frombuffer(b"".join(self._keys), dtype="<u8").astype(np.uint64)

    def _open_block(self) -> None:
        self._hash, self._room = hashlib.blake2b(digest_size=8), BLOCK

    def _close_block(self) -> None:
        self._keys.append(self._hash.digest())
        self._open_block()
