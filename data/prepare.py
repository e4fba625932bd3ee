"""A corpus tokenized once: text files, JSONL and folders of them into one file that training maps into memory.

The file is safetensors: ``tokens`` (the smallest unsigned type that fits), ``documents`` (int64, where each begins, and
the end), ``keys`` (uint64, a hash per block) and, of a byte-level vocabulary, ``sizes`` (int64, the bytes of each
token), with the vocabulary and the tokenizer in its metadata. No torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, cast

from ..core.formats import format_of, is_url
from ..core.storage import Storage
from ..core.tensorfile import Item, header
from .corpus import BLOCK, FORMAT, Collector
from .files import Files, locate, wrong
from .text import BYTES, Piece, Tokenizer, encode, json_tokenizer, open_tokenizer, read_pieces, train_bpe

BPE = "bpe"
"""The name that stands for a tokenizer trained on the input itself."""

ENDING = ".tokens"
_BLOCK = 32 << 20  # bytes copied at a time
_SHOWN = 8
_CODES = {"uint8": "U8", "uint16": "U16", "uint32": "U32"}


@dataclass(frozen=True)
class Progress:
    """How far it is: which file of how many is read, and the tokens that are done."""

    file: int
    files: int
    tokens: int


@dataclass(frozen=True)
class Prepared:
    """What was written.

    Attributes:
        path: the token file.
        tokenizer: the file of a tokenizer that was trained; empty where none was.
        documents, tokens: how many.
        dtype: of a token.
        vocabulary_size: all tokens are below it.
    """

    path: str
    tokenizer: str
    documents: int
    tokens: int
    dtype: str
    vocabulary_size: int


def prepare(
    inputs: Sequence[str],
    out: str,
    *,
    tokenizer: str = BYTES,
    vocabulary: int | None = None,
    field: str = "text",
    pattern: str | None = None,
    end_token: str | None = None,
    force: bool = False,
    progress: Callable[[Progress], object] = lambda _: None,
) -> Prepared:
    """Tokenize ``inputs`` into the file ``out``, which appears when it is complete; before, nothing of it can be seen.

    Args:
        inputs: paths or URLs of text or JSONL files (plain or gzip), or of folders of them.
        out: path or URL of the file, ending in '.tokens'.
        tokenizer: 'bytes', 'bpe' (trained on the inputs, and written beside ``out``), or a 'tokenizer.json'.
        vocabulary: tokens of a 'bpe' to train.
        field: of JSONL, the field that holds the text.
        pattern: which files of a folder are taken, as '*.py'; the default is text and JSONL by their endings.
        end_token: of a 'tokenizer.json', the token that ends documents.
        force: replace an existing file.
        progress: called after every piece of text.

    Raises:
        JobError: the inputs are missing, empty or not readable as text, or ``out`` exists or cannot be written.
    """
    storage, name = _target(out, force=force)
    if (tokenizer == BPE) != (vocabulary is not None):
        what = "is missing" if tokenizer == BPE else "says how much a tokenizer learns, and none is trained"
        raise wrong(what, "a tokenizer is trained by --tokenizer bpe --vocab N", "--vocab")
    files = [_texts(text, pattern) for text in inputs]
    learned = b""
    if vocabulary is None:
        model = open_tokenizer(tokenizer, end_token, where="--tokenizer")
    else:
        learned = train_bpe(_pieces(files, field), vocabulary, where="--vocab")
        model = json_tokenizer(learned, BPE, end_token, where="--end-token")
    beside = f"{name.removesuffix(ENDING)}.tokenizer.json" if learned else ""
    with tempfile.TemporaryFile(dir=None if is_url(out) else Path(str(storage))) as spool:
        collector = Collector(spool.write)
        _encode(_pieces(files, field, collector, progress), model, collector)
        if not collector.tokens:
            raise wrong("there is no text in it", where="INPUT")
        try:
            if beside:
                storage.write(beside, [learned])
            storage.write(name, _content(collector, model, cast(BinaryIO, spool)))
        except OSError as error:
            raise wrong(f"'{out}' cannot be written: {error.strerror or error}", where="--out") from error
    return Prepared(
        path=out,
        tokenizer=out.removesuffix(name) + beside if beside else "",
        documents=len(collector.documents) - 1,
        tokens=collector.tokens,
        dtype=str(model.dtype),
        vocabulary_size=model.vocabulary_size,
    )


def _target(out: str, *, force: bool) -> tuple[Storage, str]:
    """The folder of ``out``, and its name in it."""
    parent, _, name = out.rpartition("/")
    if not name.endswith(ENDING) or name == ENDING:
        raise wrong(f"'{out}' does not end in '{ENDING}'", f"write '{out.rstrip('/')}{ENDING}'", "--out")
    if not is_url(out):
        folder = Path(out).expanduser().parent
        if not folder.is_dir():
            raise wrong(f"the folder {folder} does not exist", where="--out")
        parent = str(folder)
    storage = Storage(parent, where="--out")
    try:
        if storage.exists(name) and not force:
            raise wrong(f"'{out}' exists", "--force replaces it", "--out")
    except OSError as error:
        raise wrong(f"'{out}' cannot be written: {error.strerror or error}", where="--out") from error
    return storage, name


def _texts(source: str, pattern: str | None) -> Files:
    """The files to take of an input."""
    files = locate(source, where="INPUT")
    if not files.is_folder:
        return files
    if pattern is None:
        names = tuple(name for name in files.names if format_of(name) in ("text", "jsonl"))
        hint = "taken are .txt and .jsonl, plain or .gz; --glob '*.py' takes others"
    else:
        names = tuple(name for name in files.names if fnmatch(name, pattern))
        hint = f"there are: {', '.join(files.names[:_SHOWN])}"
    if not names:
        raise wrong(f"no file in '{source}' is taken", hint, "INPUT" if pattern is None else "--glob")
    return replace(files, names=names)


def _pieces(
    files: Sequence[Files],
    field: str,
    collector: Collector | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
) -> Iterator[Piece]:
    """All text, file by file; tells how far ``collector`` is."""
    total = sum(len(one.names) for one in files)
    begun = 0
    for one in files:
        for name in one.names:
            begun += 1
            for piece in read_pieces(one, (name,), field=field):
                yield piece
                if collector is not None:
                    progress(Progress(begun, total, collector.tokens))


def _encode(pieces: Iterator[Piece], model: Tokenizer, collector: Collector) -> None:
    for ids, ends in encode(pieces, model):
        collector.take(ids, ends=ends)


def _content(collector: Collector, model: Tokenizer, spool: BinaryIO) -> Iterator[bytes]:
    """The bytes of the token file; wide types first, so that each tensor lies at a multiple of its element's size."""
    documents, keys = collector.documents, collector.keys
    metadata = {
        "dltrain": FORMAT,
        "vocabulary_size": str(model.vocabulary_size),
        "tokenizer": model.name,
        "tokenizer_sha256": model.sha256,
        "end_token": "" if model.end is None else str(model.end),
        "block": str(BLOCK),
    }
    sizes = model.sizes
    items = [
        Item("documents", "I64", documents.shape),
        Item("keys", "U64", keys.shape),
        *([Item("sizes", "I64", sizes.shape)] if sizes is not None else []),
        Item("tokens", _CODES[str(model.dtype)], (collector.tokens,)),
    ]
    yield header(items, metadata)
    yield documents.tobytes()
    yield keys.tobytes()
    if sizes is not None:
        yield sizes.tobytes()
    spool.seek(0)
    while block := spool.read(_BLOCK):
        yield block
