"""Windows of tokens to predict the next one: from text and JSONL, tokenized when they are opened, or a token file."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..core.formats import Format
from ..core.job import DataSpec, Split
from ..core.spec import Spec
from .corpus import FORMAT, Collector, Corpus
from .files import OPTIONS, Files, read_options, wrong
from .split import PARTS, part_of
from .text import BYTES, encode, open_tokenizer, read_pieces


class TokenOptions(Spec):
    length: int = Field(default=128, gt=0)
    """Tokens in a window: x has the window, y the same shifted by one."""


class TextOptions(TokenOptions):
    tokenizer: str = Field(default=BYTES, min_length=1)
    """'bytes' (UTF-8, 256 tokens), or the path or URL of a 'tokenizer.json'."""
    end_token: str | None = None
    """The token that ends every document; the default is a usual one that the vocabulary has."""


class JsonlOptions(TextOptions):
    text: str = "text"
    """The field of every line that holds its text."""


def read_jsonl(files: Files, spec: DataSpec) -> TokenSource:
    """Windows of the texts in JSONL files, a document a line; tokenized now, in memory.

    Raises:
        JobError: a line has no text, or there is too little of it for one window of training.
    """
    options = read_options(JsonlOptions, spec.options)
    return _tokenized(files, "jsonl", options, options.text, spec)


def read_text(files: Files, spec: DataSpec) -> TokenSource:
    """Windows of text files, a document each; tokenized now, in memory.

    Raises:
        JobError: one is not UTF-8, or there is too little text for one window of training.
    """
    return _tokenized(files, "text", read_options(TextOptions, spec.options), "", spec)


def _tokenized(files: Files, format: Format, options: TextOptions, field: str, spec: DataSpec) -> TokenSource:
    tokenizer = open_tokenizer(options.tokenizer, options.end_token, spec.storage, where=f"{OPTIONS}.tokenizer")
    content = BytesIO()
    collector = Collector(content.write)
    for ids, ends in encode(read_pieces(files, files.of(format), field=field), tokenizer):
        collector.take(ids, ends=ends)
    tokens = np.frombuffer(content.getbuffer(), dtype=tokenizer.dtype)
    corpus = Corpus(tokens, collector.documents, collector.keys, tokenizer.vocabulary_size, tokenizer.sizes)
    return TokenSource(corpus, length=options.length, split=spec.split)


def read_tokens(files: Files, spec: DataSpec) -> TokenSource:
    """Windows of a file that ``dltrain data prepare`` made, mapped into memory: nothing of the text is read yet.

    Raises:
        JobError: it is no such file, or there is too little text for one window of training.
    """
    from safetensors import SafetensorError, safe_open

    options = read_options(TokenOptions, spec.options)
    name = files.one("tokens")
    with files.reading(name, "a token file"), files.mappable(name) as path:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("dltrain") != FORMAT:
                    raise ValueError("'dltrain data prepare' did not make it")
                names = ["tokens", "documents", "keys", *({"sizes"} & set(file.keys()))]
                arrays = {key: file.get_tensor(key).numpy() for key in names}
        except SafetensorError as error:
            raise ValueError(error) from error
        corpus = Corpus(**arrays, vocabulary_size=int(metadata["vocabulary_size"]))
    return TokenSource(corpus, length=options.length, split=spec.split)


class TokenSource:
    """Windows of ``length`` + 1 tokens, one after the other: 'x' and 'y' int64 ``[n, length]``, y one token later.

    Where the corpus knows its tokens' sizes there is 'bytes' too, int64 ``[n]``: the bytes of text that y stands for.

    The corpus is split before it is cut: each block of a document belongs to one part, by a hash of its tokens, and the
    windows of a part run through its blocks in their order. So every token of a part is predicted once (but the first,
    and a rest shorter than a window), documents of any length take part, and text that is added anywhere moves no
    other text from one part to another.

    Args:
        corpus: the text.
        length: tokens in a window.
        split: shares of the parts.

    Raises:
        JobError: the training part has too few tokens for one window.
    """

    def __init__(self, corpus: Corpus, *, length: int, split: Split) -> None:
        self.vocabulary_size = corpus.vocabulary_size
        self._tokens, self._sizes, self._length = corpus.tokens, corpus.sizes, length
        starts, stops = corpus.blocks()
        part = np.zeros(len(starts), dtype=np.int64) if split.train == 1.0 else part_of(corpus.keys, split)
        order = np.argsort(part, kind="stable")
        # Blocks that follow each other in the corpus and in their part make one run.
        starts, stops, part = starts[order], stops[order], part[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (starts[1:] != stops[:-1]) | (part[1:] != part[:-1])
        sizes = np.bincount(part, weights=stops - starts, minlength=len(PARTS)).astype(np.int64)
        ends = np.cumsum(stops - starts)
        places = ends - (stops - starts)  # of each block, in the parts laid end to end
        self._run_places = places[first]
        self._run_starts = starts[first]
        self._part_places = np.cumsum(sizes) - sizes
        self._windows = np.maximum(sizes - 1, 0) // length
        if not self._windows[0]:
            what = f"the training part has {sizes[0]} tokens, a window takes {length + 1}"
            raise wrong(what, "give more text, or shorter windows", f"{OPTIONS}.length")

    def __len__(self) -> int:
        return int(self._windows.sum())

    def parts(self) -> Mapping[str, range]:
        """The windows of each part."""
        ends = np.cumsum(self._windows)
        return {
            name: range(int(end - count), int(end)) for name, end, count in zip(PARTS, ends, self._windows, strict=True)
        }

    def fetch(self, indices: np.ndarray) -> dict[str, Tensor]:
        ends = np.cumsum(self._windows)
        part = np.searchsorted(ends, indices, side="right")
        begin = self._part_places[part] + (indices - (ends - self._windows)[part]) * self._length
        places = begin[:, None] + np.arange(self._length + 1)
        run = np.searchsorted(self._run_places, places, side="right") - 1
        tokens = self._tokens[self._run_starts[run] + places - self._run_places[run]]
        windows = torch.from_numpy(tokens.astype(np.int64))
        fields = {"x": windows[:, :-1].contiguous(), "y": windows[:, 1:].contiguous()}
        if self._sizes is not None:
            fields["bytes"] = torch.from_numpy(self._sizes[tokens[:, 1:]].sum(axis=1))
        return fields
