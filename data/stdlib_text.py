"""The source text of Python's standard library as tokens: bytes, or pairs of them merged (BPE)."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ..core.errors import JobError, Problem
from ..core.job import Split
from .corpus import BLOCK, Corpus
from .files import OPTIONS
from .split import part_of
from .text import Piece, Tokenizer, byte_tokenizer, encode, json_tokenizer, train_bpe
from .tokens import TokenOptions, TokenSource

_SKIPPED = {"test", "tests", "idle_test"}  # some distributions leave them out


class StdlibOptions(TokenOptions):
    """Options of 'stdlib_text' (``data.options:``)."""

    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """'bytes': 256 tokens. 'bpe': byte pairs merged (needs the 'text' extra), learned from the training part alone."""
    vocab: int = Field(1024, gt=256)
    """Number of different tokens of 'bpe'; give the model the same."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if "vocab" in self.model_fields_set and self.tokenizer != "bpe":
            raise ValueError("'vocab' is of use to the tokenizer 'bpe' only")
        return self


def stdlib_text(options: StdlibOptions, split: Split) -> TokenSource:
    """Windows of the standard library's text, which is that of the installed release of Python.

    The split deals blocks of text before there are tokens, so it is the same under every tokenizer, and a tokenizer can
    be learned from the training part alone. Each block is a document of the corpus, shorter than a block of tokens.

    Raises:
        JobError: there is no source text, too little of it for a window of training, or ``tokenizers`` is not
            installed.
    """
    blocks = [block for text in modules() for block in _blocks(text)]
    keys = np.array([_key(block.text) for block in blocks], dtype=np.uint64)
    training = part_of(keys, split) == 0
    tokenizer = byte_tokenizer() if options.tokenizer == "bytes" else _learn(compress(blocks, training), options.vocab)
    ids = [found for found, _ in encode(blocks, tokenizer)]
    documents = np.cumsum([0, *map(len, ids)])
    corpus = Corpus(np.concatenate(ids), documents, keys, tokenizer.vocabulary_size, tokenizer.sizes)
    return TokenSource(corpus, length=options.length, split=split)


def modules() -> Sequence[str]:
    """The text of every module of the standard library, without its tests and empty ones, by path.

    Raises:
        JobError: the library has no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    entries = [path for path in root.iterdir() if path.stem in sys.stdlib_module_names] if root.is_dir() else []
    files = [file for entry in entries for file in ([entry] if entry.suffix == ".py" else entry.rglob("*.py"))]
    paths = sorted(path.parts for file in files if not _SKIPPED & set((path := file.relative_to(root)).parts))
    if not paths:
        hint = "use a Python that is not packed into an archive"
        raise JobError(Problem(f"Python's standard library has no source text in {root}", "data.source", hint))
    texts = (root.joinpath(*parts).read_bytes().decode(errors="replace") for parts in paths)
    return [text for text in texts if text]


def _blocks(text: str) -> Iterator[Piece]:
    """A module in blocks, which end where a character does; of any tokenizer's tokens, with one for the end, they have
    at most :data:`~.corpus.BLOCK`."""
    content = text.encode()
    begin = 0
    while begin < len(content):
        stop = min(begin + BLOCK - 1, len(content))
        while stop < len(content) and content[stop] & 0xC0 == 0x80:
            stop -= 1
        yield Piece(content[begin:stop].decode(), ends=stop == len(content))
        begin = stop


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _learn(pieces: Iterator[Piece], vocabulary: int) -> Tokenizer:
    where = f"{OPTIONS}.tokenizer"
    return json_tokenizer(train_bpe(pieces, vocabulary, where=where), "bpe", where=where)
