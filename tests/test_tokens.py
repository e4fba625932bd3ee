"""Text as windows of tokens: from text, JSONL and prepared files; nothing lost, nothing in two parts."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from dltrain.core.errors import JobError
from dltrain.core.job import DataSpec, Split
from dltrain.core.storage import Storage
from dltrain.core.tensorfile import Item, header
from dltrain.data.corpus import BLOCK, Collector, Corpus
from dltrain.data.prepare import prepare
from dltrain.data.sources import open_source
from dltrain.data.split import split_source
from dltrain.data.tokens import TokenSource
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import refusal, resident

WHOLE = Split(train=1.0, val=0.0, test=0.0)
THIRDS = Split(train=0.4, val=0.3, test=0.3)


def texts(n: int, seed: int, longest: int = 900) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefgh \nü", k=draw.randrange(1, longest))) for _ in range(n)]


def jsonl(documents: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)).encode()


def streams(spec: DataSpec) -> dict[str, list[int]]:
    """The tokens of each part, put together again from its windows."""
    source = open_source(spec)
    found: dict[str, list[int]] = {}
    for name, indices in split_source(source, spec.split).items():
        if len(indices):
            got = source.fetch(np.asarray(indices))
            assert torch.equal(got["x"].flatten()[1:], got["y"].flatten()[:-1])
            assert got["x"].dtype == got["y"].dtype == torch.int64
            found[name] = [int(got["x"][0, 0]), *got["y"].flatten().tolist()]
    return found


# --- text and JSONL


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "txt"])
def test_bytes_of_text_are_tokens(storage: Storage, ending: str) -> None:
    documents = texts(1 if ending == "txt" else 9, seed=0, longest=3000)
    content = documents[0].encode() if ending == "txt" else jsonl(documents)
    storage.write(f"a.{ending}", [gzip.compress(content) if ending.endswith("gz") else content])
    stream = b"".join(text.encode() + b"\0" for text in documents)
    found = streams(DataSpec(source=f"{storage}/a.{ending}", options={"length": 10}, split=WHOLE))
    assert bytes(found["train"]) == stream[: (len(stream) - 1) // 10 * 10 + 1]


def test_files_of_a_folder_are_documents_in_their_order(tmp_path: Path) -> None:
    for name, text in (("b.txt", "bb"), ("a.txt", "aaa"), ("c.txt", ""), ("d/e.txt", "e" * 9)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = streams(DataSpec(source=str(tmp_path), options={"length": 1}, split=WHOLE))
    assert bytes(found["train"]) == b"aaa\0bb\0eeeeeeeee\0"


@pytest.mark.parametrize(
    ("content", "options", "where", "says"),
    [
        (jsonl(["ab"], "body"), {}, "data.source", "line 1 of '{}' has no text in the field 'text'"),
        (jsonl(["ab"], "body"), {"text": "bodi"}, "data.source", "did you mean 'body'?"),
        (jsonl(["ab"]) + b'{"text": 3}', {}, "data.source", "line 2 of '{}' has no text"),
        (jsonl(["ab"]) + b"{", {}, "data.source", "cannot be read as JSONL: line 2: "),
        (b"[1]", {}, "data.source", "line 1 is no JSON object"),
        (
            gzip.compress(jsonl(["ab" * 99]), mtime=0)[:-9],
            {},
            "data.source",
            "cannot be read as JSONL: Compressed file ended",
        ),
        (jsonl(["abc"]), {"length": 4}, "data.options.length", "the training part has 4 tokens, a window takes 5"),
        (b"", {"length": 4}, "data.options.length", "the training part has 0 tokens"),
        (jsonl(["ab"]), {"tokenizer": "nowhere.json"}, "data.options.tokenizer", "no such file: 'nowhere.json'"),
        (jsonl(["ab"]), {"end_token": "</s>"}, "data.options.tokenizer", "bytes have no tokens with names"),
        (jsonl(["ab"]), {"lenght": 3}, "data.options.lenght", "did you mean 'length'?"),
    ],
)
def test_jsonl_that_is_refused(content: bytes, options: dict[str, Any], where: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(JobError) as refused:
        open_source(DataSpec(source=str(path), options=options, split=WHOLE))
    assert refused.value.problems[0].where == where
    assert says.format(path) in str(refused.value)


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"line\n" * 300_000 + "ü".encode("latin-1"))
    assert "byte 1500000 is not UTF-8" in refusal(str(tmp_path / "a.txt"))[1]


# --- the split


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_every_token_is_in_one_part_and_stays_there(seed: int) -> None:
    draw = random.Random(seed)
    documents = [np.arange(draw.choice((1, 7, 300, BLOCK, BLOCK + 1, 3 * BLOCK))) + 100_000 * i for i in range(12)]

    def parts(kept: list[np.ndarray]) -> list[set[int]]:
        content: list[bytes] = []
        collector = Collector(content.append)
        for document in kept:
            cut = draw.randrange(len(document))
            collector.take(document[:cut].astype(np.uint32), ends=False)
            collector.take(document[cut:].astype(np.uint32), ends=True)
        tokens = np.frombuffer(b"".join(content), dtype=np.uint32)
        source = TokenSource(
            Corpus(tokens, collector.documents, collector.keys, 1 << 31),
            length=1,
            split=Split(train=0.5, val=0.2, test=0.3),
        )
        fetched = [source.fetch(np.asarray(indices, dtype=np.int64)) for indices in source.parts().values()]
        return [set(got["x"].flatten().tolist()) | set(got["y"].flatten().tolist()) for got in fetched]

    added = draw.randrange(12)
    try:
        whole, fewer = parts(documents), parts(documents[:added] + documents[added + 1 :])
    except JobError:  # by chance there is nothing to train on
        return
    assert not whole[0] & whole[1] | whole[0] & whole[2] | whole[1] & whole[2]
    assert len(set().union(*whole)) >= sum(map(len, documents)) - 2  # a part of one token has no window
    gone = set(documents[added].tolist())
    assert all(len(before ^ (after - gone)) <= 1 for before, after in zip(fewer, whole, strict=True))


def test_documents_that_are_added_move_no_other(tmp_path: Path) -> None:
    documents, more = texts(300, seed=1), texts(200, seed=2)
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents))
    (tmp_path / "b.jsonl").write_bytes(jsonl(random.Random(3).sample([*documents, *more], 500)))
    before, after = (
        {name: bytes(part).split(b"\0") for name, part in streams(spec).items()}
        for spec in (
            DataSpec(source=str(tmp_path / f), options={"length": 1}, split=THIRDS) for f in ("a.jsonl", "b.jsonl")
        )
    )
    assert sum(len(part) for part in before.values()) >= 300
    for name, part in before.items():
        assert len(part) > 60
        assert not set(part) - set(after[name])


def test_the_split_of_text_never_changes_between_releases(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([chr(97 + i) * 20 for i in range(26)]))
    found = streams(DataSpec(source=str(tmp_path / "a.jsonl"), options={"length": 1}, split=THIRDS))
    letters = {name: "".join(dict.fromkeys(bytes(part).decode().replace("\0", ""))) for name, part in found.items()}
    assert letters == {"train": "deghiouvy", "val": "abfklnrswxz", "test": "cjmpqt"}


# --- token files


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_prepared_corpus_is_the_text(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    documents = texts(50, seed=4, longest=9000)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(jsonl(documents, "body"))
    (tmp_path / "texts" / "b.txt.gz").write_bytes(gzip.compress(b"the end"))
    folder = str(tmp_path) if place == "local" else f"s3://{request.getfixturevalue('bucket')}/corpora"
    told: list[int] = []
    done = prepare(
        [str(tmp_path / "texts")], f"{folder}/c.tokens", field="body", progress=lambda at: told.append(at.file)
    )
    stream = b"".join(text.encode() + b"\0" for text in [*documents, "the end"])
    assert (done.documents, done.tokens, done.dtype, done.vocabulary_size) == (51, len(stream), "uint8", 256)
    assert set(told) == {1, 2}
    for split in (WHOLE, THIRDS):
        prepared = streams(DataSpec(source=f"{folder}/c.tokens", options={"length": 16}, split=split))
        straight = streams(
            DataSpec(source=str(tmp_path / "texts/a.jsonl"), options={"length": 16, "text": "body"}, split=split)
        )
        assert {name: part[:500] for name, part in prepared.items()} == {n: part[:500] for n, part in straight.items()}
    assert Storage(folder).names() == ["c.tokens"] if place == "s3" else True


def test_a_token_file_is_plain_safetensors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b.txt").write_text("c" * (BLOCK + 1))
    prepare([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], str(tmp_path / "c.tokens"))
    stored = safetensors.numpy.load_file(tmp_path / "c.tokens")
    assert bytes(stored["tokens"]) == b"ab\0" + b"c" * (BLOCK + 1) + b"\0"
    assert stored["documents"].tolist() == [0, 3, 3 + BLOCK + 2]
    assert (stored["keys"].dtype, stored["keys"].shape) == (np.uint64, (3,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "c.tokens"]


def test_a_tokenizer_of_ones_own_text(tmp_path: Path) -> None:
    import tokenizers

    documents = ["the cat sat on the mat " * 30, "the dog ate the cat\n" * 20]
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents))
    source, out = str(tmp_path / "a.jsonl"), str(tmp_path / "c.tokens")
    done = prepare([source], out, tokenizer="bpe", vocabulary=300)
    assert done.tokenizer == str(tmp_path / "c.tokenizer.json")
    assert 257 < done.vocabulary_size <= 300
    assert done.dtype == "uint16"
    model = tokenizers.Tokenizer.from_file(done.tokenizer)
    expected = [token for text in documents for token in [*model.encode(text).ids, model.token_to_id("<|endoftext|>")]]
    assert safetensors.numpy.load_file(out)["tokens"].tolist() == expected
    assert model.decode(expected) == "".join(documents)
    again = prepare([source], str(tmp_path / "d.tokens"), tokenizer=done.tokenizer)
    assert (again.tokens, again.vocabulary_size) == (done.tokens, done.vocabulary_size)
    straight = {"length": 4, "tokenizer": done.tokenizer}
    assert streams(DataSpec(source=source, options=straight, split=WHOLE)) == streams(
        DataSpec(source=out, options={"length": 4}, split=WHOLE)
    )


def test_windows_of_merged_bytes_say_how_many_they_are(tmp_path: Path) -> None:
    import tokenizers

    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(40, seed=5)))
    source, out = str(tmp_path / "a.jsonl"), str(tmp_path / "c.tokens")
    model = tokenizers.Tokenizer.from_file(prepare([source], out, tokenizer="bpe", vocabulary=400).tokenizer)
    end, size = model.token_to_id("<|endoftext|>"), 20
    for spec in (
        DataSpec(source=out, options={"length": size}, split=WHOLE),
        DataSpec(source=source, options={"length": size, "tokenizer": str(tmp_path / "c.tokenizer.json")}, split=WHOLE),
    ):
        opened = open_source(spec)
        got = opened.fetch(np.arange(len(opened)))
        text = model.decode(got["y"].flatten().tolist())  # leaves the end of text out
        assert int(got["bytes"].sum()) == len(text.encode()) + int((got["y"] == end).sum())
        assert got["bytes"].shape == (len(opened),)
        assert int(got["bytes"].min()) >= size


def test_a_tokenizer_of_words_does_not_say_how_many_bytes_they_are(tmp_path: Path) -> None:
    import tokenizers

    words = {"<unk>": 0, **{word: i for i, word in enumerate(("the", "cat", "sat", "on", "mat"), start=1)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    options = {"length": 2, "tokenizer": str(tmp_path / "words.json")}
    source = open_source(DataSpec(source=str(tmp_path / "a.txt"), options=options, split=WHOLE))
    assert source.fetch(np.array([0])).keys() == {"x", "y"}


def test_a_large_token_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    n = 1 << 31
    with (tmp_path / "a.tokens").open("wb") as file:  # tokens of a hole of 2 GiB
        items = [Item("documents", "I64", (2,)), Item("keys", "U64", (n // BLOCK,)), Item("tokens", "U8", (n,))]
        file.write(header(items, {"dltrain": "tokens-1", "vocabulary_size": "256"}))
        file.write(np.array([0, n], dtype=np.int64).tobytes())
        file.write(np.arange(n // BLOCK, dtype=np.uint64).tobytes())
        file.truncate(file.tell() + n)
    before = resident()
    source = open_source(DataSpec(source=str(tmp_path / "a.tokens"), options={"length": 1024}))
    assert len(source) >= (n - 3) // 1024 - 3
    assert source.fetch(np.array([len(source) - 1]))["x"].tolist() == [[0] * 1024]
    assert resident() - before < 256 << 20


@pytest.mark.parametrize(
    ("arguments", "where", "says"),
    [
        ({"inputs": ["nothing.txt"]}, "INPUT", "no such file: 'nothing.txt'"),
        ({"inputs": ["empty.txt"]}, "INPUT", "there is no text in it"),
        ({"inputs": ["bad.txt"]}, "INPUT", "byte 3 is not UTF-8"),
        ({"inputs": ["folder"]}, "INPUT", "no file in 'folder' is taken"),
        ({"inputs": ["folder"], "pattern": "*.rs"}, "--glob", "there are: a.py"),
        ({"out": "corpus"}, "--out", "write 'corpus.tokens'"),
        ({"out": "nowhere/c.tokens"}, "--out", "the folder nowhere does not exist"),
        ({"out": "there.tokens"}, "--out", "--force replaces it"),
        ({"tokenizer": "bpe"}, "--vocab", "is missing"),
        ({"vocabulary": 300}, "--vocab", "none is trained"),
        ({"tokenizer": "bpe", "vocabulary": 200}, "--vocab", "at least 257"),
        ({"tokenizer": "tokenizer.jsn"}, "--tokenizer", "no such file"),
        ({"tokenizer": "bad.txt"}, "--tokenizer", "cannot be read as a tokenizer"),
    ],
)
def test_what_cannot_be_prepared(arguments: dict[str, Any], where: str, says: str, empty_folder: Path) -> None:
    Path("good.txt").write_text("good")
    Path("empty.txt").touch()
    Path("bad.txt").write_bytes(b"bad\xff")
    Path("folder").mkdir()
    Path("folder/a.py").write_text("pass")
    Path("there.tokens").write_bytes(b"old")
    before = sorted(path.name for path in empty_folder.iterdir())
    with pytest.raises(JobError) as refused:
        prepare(**{"inputs": ["good.txt"], "out": "c.tokens", **arguments})
    assert refused.value.problems[0].where == where
    assert says in str(refused.value)
    assert sorted(path.name for path in empty_folder.iterdir()) == before
    assert Path("there.tokens").read_bytes() == b"old"


def test_force_replaces(empty_folder: Path) -> None:
    Path("a.txt").write_text("good")
    Path("c.tokens").write_bytes(b"old")
    assert prepare(["a.txt"], "c.tokens", force=True).tokens == 5
    assert bytes(safetensors.numpy.load_file("c.tokens")["tokens"]) == b"good\0"


@pytest.mark.parametrize("damage", ["cut", "no tokens", "another's", "other blocks", "other sizes"])
def test_damaged_token_files(damage: str, empty_folder: Path) -> None:
    tensors = {"tokens": np.zeros(9, np.uint8), "documents": np.array([0, 9]), "keys": np.zeros(1, np.uint64)}
    metadata = {"dltrain": "tokens-1", "vocabulary_size": "256"}
    if damage == "no tokens":
        del tensors["tokens"]
    if damage == "another's":
        metadata = {}
    if damage == "other blocks":
        tensors["keys"] = np.zeros(2, np.uint64)
    if damage == "other sizes":
        tensors["sizes"] = np.ones(255, np.int64)
    content = safetensors.numpy.save(tensors, metadata)
    Path("a.tokens").write_bytes(content[:-1] if damage == "cut" else content)
    assert "'a.tokens' cannot be read as a token file" in refusal("a.tokens", length=2)[1]
