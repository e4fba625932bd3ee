"""The source text of Python's standard library as tokens: bytes, or pairs of them merged (BPE)."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..core.errors import JobError, Problem
from ..core.job import Spec, Split
from .split import split as split_indices

_SKIPPED = {"test", "tests", "idle_test"}  # some distributions leave them out
_BLOCK = 4096  # bytes that BPE encodes as one
_WHERE = "data.source"


class TextOptions(Spec):
    """Options of 'stdlib_text' (``data.options:``)."""

    length: int = Field(256, gt=0)
    """Tokens in 'x', and in 'y', which is one token further on."""
    stride: int | None = Field(None, gt=0)
    """Tokens from one window's begin to the next; the default, and the least, is length. So no text that a test sample
    has to predict is a target in training."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """'bytes': 256 tokens. 'bpe': byte pairs merged (needs the 'text' extra), learned from the training part alone."""
    vocab: int = Field(1024, gt=256)
    """Number of different tokens of 'bpe'; give the model the same."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.stride is not None and self.stride < self.length:
            raise ValueError(f"a stride of {self.stride} makes windows of {self.length} tokens overlap")
        if "vocab" in self.model_fields_set and self.tokenizer != "bpe":
            raise ValueError("'vocab' is of use to the tokenizer 'bpe' only")
        return self


class TokenWindows:
    """Windows of a text: 'x' int64 ``[n, length]``, 'y' the tokens one further on.

    Args:
        text: the text that the tokens spell.
        tokens: unsigned integers of any size, one axis.
        starts: where each window begins, int64.
        length: tokens in 'x'.
        ends: where each token ends in the text, in bytes. With it there is a field 'bytes' int64 ``[n]``: the bytes
            that the targets stand for. Without it tokens are bytes.
    """

    def __init__(
        self, text: bytes, tokens: np.ndarray, starts: np.ndarray, length: int, *, ends: np.ndarray | None = None
    ) -> None:
        self._text, self._tokens, self._starts, self._length, self._ends = text, tokens, starts, length, ends

    def __len__(self) -> int:
        return len(self._starts)

    def fetch(self, indices: np.ndarray) -> dict[str, Tensor]:
        starts = self._starts[indices]
        found = self._tokens[starts[:, None] + np.arange(self._length + 1)].astype(np.int64)
        fields = {"x": torch.from_numpy(found[:, :-1].copy()), "y": torch.from_numpy(found[:, 1:].copy())}
        if self._ends is not None:
            fields["bytes"] = torch.from_numpy(self._ends[starts + self._length] - self._ends[starts])
        return fields

    def spell(self, index: int) -> bytes:
        """The text that the targets of sample ``index`` stand for."""
        first, last = int(self._starts[index]), int(self._starts[index]) + self._length
        if self._ends is None:
            return self._text[first + 1 : last + 1]
        return self._text[self._ends[first] : self._ends[last]]


def stdlib_text(options: TextOptions, split: Split) -> TokenWindows:
    """The windows of the standard library's text, which is that of the installed release of Python.

    Raises:
        JobError: there is no source text, it is shorter than a window, or ``tokenizers`` is not installed.
    """
    text = corpus()
    stride = options.stride or options.length
    if options.tokenizer == "bytes":
        tokens = np.frombuffer(text, dtype=np.uint8)
        starts = _starts(len(tokens), options.length, stride)
        _refuse_none(len(starts), options.length)
        return TokenWindows(text, tokens, starts, options.length)
    return _bpe_windows(text, options, stride, split)


def corpus() -> bytes:
    """All modules of the standard library without its tests, by path, with a zero byte between files.

    Raises:
        JobError: the library has no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    entries = [path for path in root.iterdir() if path.stem in sys.stdlib_module_names] if root.is_dir() else []
    files = [file for entry in entries for file in ([entry] if entry.suffix == ".py" else entry.rglob("*.py"))]
    paths = sorted(path.parts for file in files if not _SKIPPED & set((path := file.relative_to(root)).parts))
    if not paths:
        hint = "use a Python that is not packed into an archive"
        raise JobError(Problem(f"Python's standard library has no source text in {root}", _WHERE, hint))
    return b"\0".join(root.joinpath(*parts).read_bytes() for parts in paths)


def _starts(tokens: int, length: int, stride: int) -> np.ndarray:
    return np.arange(0, max(0, tokens - length), stride, dtype=np.int64)


def _refuse_none(windows: int, length: int) -> None:
    if not windows:
        raise JobError(Problem(f"no text is long enough for {length} tokens", "data.options.length", "lower it"))


def _bpe_windows(text: bytes, options: TextOptions, stride: int, split: Split) -> TokenWindows:
    """Windows of BPE tokens, of which the training part alone has shaped the vocabulary.

    Which part a window belongs to is known by its index, but the windows only when there is a vocabulary. So the text
    is dealt out first, by the same rule, in blocks of bytes; then every part is cut into windows of its own, and these
    are laid onto the indices that belong to the part.
    """
    # As Latin-1 every byte is a character, so blocks may begin anywhere and tokens spell bytes.
    blocks = [text[i : i + _BLOCK].decode("latin-1") for i in range(0, len(text), _BLOCK)]
    parts = {name: [blocks[i] for i in indices] for name, indices in split_indices(len(blocks), split).items()}
    tokenizer = _learn(parts["train"], options.vocab)
    texts = {name: _encode(tokenizer, part) for name, part in parts.items()}
    found = {name: _starts(len(ids), options.length, stride) for name, ids in texts.items()}
    total = sum(map(len, found.values()))
    _refuse_none(len(found["train"]), options.length)
    places = {name: np.asarray(indices) for name, indices in split_indices(total, split).items()}
    # As many windows as there are before any part runs out; chance leaves some windows of the others over.
    count = min([total, *(int(at[len(found[name])]) for name, at in places.items() if len(at) > len(found[name]))])
    _refuse_none(count, options.length)
    starts = np.zeros(count, dtype=np.int64)
    offset = 0
    for name, ids in texts.items():
        mine = places[name][places[name] < count]
        starts[mine] = found[name][: len(mine)] + offset
        offset += len(ids)
    tokens = np.concatenate(list(texts.values()))
    ends = np.cumsum(_sizes(tokenizer)[tokens])
    spelt = "".join(block for part in parts.values() for block in part).encode("latin-1")
    return TokenWindows(spelt, tokens, starts, options.length, ends=ends)


def _learn(texts: Sequence[str], vocab: int) -> Any:
    if importlib.util.find_spec("tokenizers") is None:
        raise JobError(
            Problem("'bpe' needs the package tokenizers", "data.options.tokenizer", "pip install 'dltrain[text]'")
        )
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # here, because it is an extra

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _encode(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """The tokens of all ``texts``, one after the other."""
    ids = [np.asarray(each.ids, dtype=np.uint32) for each in tokenizer.encode_batch_fast(texts)]
    return np.concatenate([np.zeros(0, dtype=np.uint32), *ids])


def _sizes(tokenizer: Any) -> np.ndarray:
    """How many characters (here: bytes) each token stands for, int64.

    The tokenizer writes a character in UTF-8, and every byte of that as a letter of its alphabet. A character belongs
    to the token that holds its first byte, so the second ones do not count.
    """
    spell = tokenizer.pre_tokenizer.pre_tokenize_str
    second = {spell(chr(code))[0][0][1] for code in range(128, 256)}
    tokens = (tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size()))
    return np.asarray([sum(letter not in second for letter in token) for token in tokens], dtype=np.int64)
