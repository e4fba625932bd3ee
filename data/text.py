"""Text to token ids: documents from text and JSONL files, and what turns them into numbers. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ..core.errors import JobError, Problem, did_you_mean
from ..core.formats import format_of
from .files import Files, locate, wrong

BYTES = "bytes"
"""The name of the tokenizer that takes UTF-8 bytes for tokens."""

END_OF_TEXT = "<|endoftext|>"
_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_PIECE = 1 << 20  # bytes of a text that are encoded as one, up to the end of the line
_BATCH = 4 << 20  # characters that are encoded in one call


@dataclass(frozen=True)
class Piece:
    """A run of text, and whether its document ends with it."""

    text: str
    ends: bool


@dataclass(frozen=True)
class Tokenizer:
    """What turns texts into token ids.

    Attributes:
        encode: the ids (int64 ``[tokens]``) of each text.
        vocabulary_size: all ids are below it.
        end: the id that follows every document; None where the vocabulary has none.
        name: "bytes", or the file it was read from.
        sha256: of its file; empty for bytes.
        sizes: as :attr:`Corpus.sizes`; known of byte-level vocabularies.
    """

    encode: Callable[[list[str]], list[np.ndarray]]
    vocabulary_size: int
    end: int | None
    name: str = BYTES
    sha256: str = ""
    sizes: np.ndarray | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every id."""
        return np.min_scalar_type(self.vocabulary_size - 1)


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as ids 0 to 255. Id 0, which text does not hold, ends a document."""
    return Tokenizer(
        lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts], 256, end=0
    )


def open_tokenizer(name: str, end_token: str | None, storage: dict[str, Any] | None = None, *, where: str) -> Tokenizer:
    """The tokenizer ``bytes``, or that of a ``tokenizer.json`` at a path or URL.

    Args:
        end_token: the token that ends documents; by default one of the usual names, if the vocabulary has it.
        storage: storage options of a URL.
        where: the key or option that names it, for messages.

    Raises:
        JobError: the file or the package is missing, it cannot be read, or it does not have the token.
    """
    if name == BYTES:
        if end_token is not None:
            raise wrong("bytes have no tokens with names", "leave the end token out: byte 0 ends documents", where)
        return byte_tokenizer()
    files = locate(name, storage, where=where)
    if files.is_folder:
        raise wrong(f"'{name}' is a folder", f"name the file: '{name.rstrip('/')}/tokenizer.json'", where)
    with files.reading(files.names[0], "a tokenizer"), files.open(files.names[0]) as file:
        return json_tokenizer(file.read(), name, end_token, where=where)


def json_tokenizer(content: bytes, name: str, end_token: str | None = None, *, where: str) -> Tokenizer:
    """A tokenizer of Hugging Face's ``tokenizers`` from what its ``tokenizer.json`` holds.

    Raises:
        JobError: the package is missing, or the vocabulary does not have the token.
        ValueError: it is no tokenizer.
    """
    try:
        import tokenizers
    except ImportError:
        raise wrong("this needs the package tokenizers", "pip install 'dltrain[text]'", where) from None
    try:
        model = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception
        raise ValueError(error) from error
    vocabulary = model.get_vocab(with_added_tokens=True)
    if end_token is not None and end_token not in vocabulary:
        raise JobError(Problem(f"'{name}' has no token '{end_token}'", where, did_you_mean(end_token, _END_TOKENS)))
    names = (end_token,) if end_token is not None else _END_TOKENS

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.array(one.ids, dtype=np.int64) for one in model.encode_batch_fast(texts, add_special_tokens=False)]

    end = next((vocabulary[token] for token in names if token in vocabulary), None)
    size = max(vocabulary.values()) + 1
    sizes = _sizes(json.loads(content), model.get_vocab(with_added_tokens=False), size)
    return Tokenizer(encode, size, end, name, hashlib.sha256(content).hexdigest(), sizes)


def _sizes(said: dict[str, Any], vocabulary: dict[str, int], size: int) -> np.ndarray | None:
    """The bytes that each token stands for, if each of its characters is one; of a token such as the end of text, one.

    ``said`` is what a tokenizer.json says, ``vocabulary`` is without added tokens.
    """
    if (said.get("decoder") or {}).get("type") != "ByteLevel" or said.get("normalizer"):
        return None
    added = {token["id"] for token in said.get("added_tokens", ())}
    sizes = np.ones(size, dtype=np.int64)
    for token, index in vocabulary.items():
        if index not in added:
            sizes[index] = len(token)
    return sizes


def train_bpe(pieces: Iterable[Piece], vocabulary_size: int, *, where: str) -> bytes:
    """The ``tokenizer.json`` of a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) trained on the pieces.

    Raises:
        JobError: the package is missing, or the vocabulary is too small for all bytes and the end of text.
    """
    if vocabulary_size < 257:
        raise wrong(f"expected at least 257 (all bytes, and the end of text), not {vocabulary_size}", where=where)
    try:
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise wrong("this needs the package tokenizers", "pip install 'dltrain[text]'", where) from None
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((piece.text for piece in pieces), trainer)
    return model.to_str().encode()


def read_pieces(files: Files, names: Iterable[str], *, field: str) -> Iterator[Piece]:
    """The documents in files: one a line of JSONL (the text in ``field``), else one a file. Empty ones are left out.

    A long text comes in pieces of about a megabyte that end with a line, so that it need not be encoded as one.

    Raises:
        JobError: a file is not UTF-8, a line is no JSON object, or has no text in ``field``.
    """
    for name in names:
        read = _lines if format_of(name) == "jsonl" else _text
        with files.reading(name, "JSONL" if read is _lines else "text"), files.open(name) as file:
            yield from read(file, files.shown(name), field, files.where)


def _lines(file: BinaryIO, shown: str, field: str, where: str) -> Iterator[Piece]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is no JSON object")
        text = record.get(field)
        if not isinstance(text, str):
            what = f"line {number} of '{shown}' has no text in the field '{field}'"
            raise wrong(
                what, did_you_mean(field, [key for key, value in record.items() if isinstance(value, str)]), where
            )
        if text:
            yield Piece(text, ends=True)


def _text(file: BinaryIO, shown: str, field: str, where: str) -> Iterator[Piece]:
    begin, last = 0, b""
    while content := file.read(_PIECE) + file.readline():
        if last:
            yield Piece(_decode(last, begin - len(last)), ends=False)
        last, begin = content, begin + len(content)
    if last:
        yield Piece(_decode(last, begin - len(last)), ends=True)


def _decode(content: bytes, begin: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {begin + error.start} is not UTF-8") from error


def encode(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, bool]]:
    """The pieces' tokens (the tokenizer's ``dtype``, ``[tokens]``), with the end token, and whether a document ends."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield from _encoded(batch, tokenizer)
            batch, size = [], 0
    yield from _encoded(batch, tokenizer)


def _encoded(batch: list[Piece], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, bool]]:
    for piece, ids in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
        if piece.ends and tokenizer.end is not None:
            ids = np.append(ids, tokenizer.end)
        yield ids.astype(tokenizer.dtype), piece.ends
