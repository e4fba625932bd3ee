"""A checkpoint's weights as plain safetensors, in one file or laid out as the Hugging Face hub does. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import JobError, Problem
from ..core.formats import is_url
from ..core.storage import Storage
from ..core.tensorfile import Item, header, nbytes, order
from .blocks import blocks
from .manifest import Manifest
from .weights import Weights, has_averages, select

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SHARD_SIZE = 5_000_000_000

_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def export_weights(storage: Storage, manifest: Manifest, path: Path) -> str:
    """Write the model's weights and buffers to ``path``, averaged where averages were kept: what a run ends with.

    ``load_state_dict`` takes what ``safetensors.torch.load_file(path)`` gives; tied weights are there by each of their
    names. The file appears when it is complete.

    Returns:
        the file's sha256.

    Raises:
        CorruptCheckpoint: a piece is missing or not the one that was written.
        JobError: the checkpoint holds no weights.
    """
    tensors = select(manifest, averaged=has_averages(manifest)).tensors
    target = path.absolute()
    return _write(storage, manifest, tensors, Storage(str(target.parent), where=str(path)), target.name, {})


def convert(
    storage: Storage,
    manifest: Manifest,
    weights: Weights,
    target: str,
    *,
    shard_size: int | None = None,
    force: bool = False,
    options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write ``weights`` and ``config.json`` to ``target``, a block of a tensor in memory at a time.

    Tied weights are written once, as ``safetensors.torch.save_model`` does: the file's metadata name the others.

    Args:
        target: path or URL of a file that ends in ``.safetensors``; or of a folder, which gets ``model.safetensors``,
            or shards and ``model.safetensors.index.json`` where the weights have more than ``shard_size`` bytes.
        shard_size: for a folder, bytes of tensors in a file at most (but one tensor); :data:`SHARD_SIZE` by default.
        force: replace what is there.
        options: storage options of the fsspec filesystem, where ``target`` is a URL.

    Returns:
        the files written, as paths or URLs.

    Raises:
        JobError: there is something at ``target`` already, it cannot be written, or ``shard_size`` is given for a file.
        CorruptCheckpoint: a piece is missing or not the one that was written.
    """
    single = target.endswith(".safetensors")
    if single and shard_size is not None:
        raise JobError(Problem("one file takes no shard size", target, "name a folder"))
    out, name = _open_target(target, options) if single else (Storage(target, options, where=target), "")
    tensors = weights.once()
    files = {name: tensors} if single else _files(manifest, tensors, shard_size or SHARD_SIZE)
    try:
        there = [] if single else [found for found in out.names() if _OURS.fullmatch(found) or found == INDEX]
        taken = [found for found in (*files, CONFIG) if out.exists(found)] + there
        if taken and not force:
            hint = "'--force' replaces it; else name another place"
            raise JobError(Problem(f"there is a {taken[0]} in {out} already", target, hint))
        for file, held in files.items():
            _write(storage, manifest, held, out, file, weights.tied)
        written = list(files)
        if len(files) > 1:
            out.write(INDEX, [_json(_index(manifest, files))])
            written.append(INDEX)
        out.write(CONFIG, [_json(_config(manifest, weights))])
        for stale in set(there) - set(written):
            out.remove(stale)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise JobError(Problem(f"cannot convert: {error.strerror or error}{place}", target)) from error
    return [f"{out}/{file}" for file in [*written, CONFIG]]


def _open_target(target: str, options: Mapping[str, Any] | None) -> tuple[Storage, str]:
    if is_url(target):
        parent, _, name = target.rpartition("/")
        return Storage(parent, options, where=target), name
    path = Path(target).expanduser().absolute()
    return Storage(str(path.parent), where=target), path.name


def _files(manifest: Manifest, tensors: Mapping[str, str], limit: int) -> dict[str, dict[str, str]]:
    """The tensors of each file, by its name: in order, as many as fit."""
    shards: list[dict[str, str]] = [{}]
    size = 0
    for name, fqn in tensors.items():
        own = nbytes(manifest.tensors[fqn].dtype, manifest.tensors[fqn].shape)
        if shards[-1] and size + own > limit:
            shards.append({})
            size = 0
        shards[-1][name] = fqn
        size += own
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def _index(manifest: Manifest, files: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    held = [manifest.tensors[fqn] for tensors in files.values() for fqn in tensors.values()]
    total = sum(nbytes(entry.dtype, entry.shape) for entry in held)
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }


def _config(manifest: Manifest, weights: Weights) -> dict[str, Any]:
    """What it takes to build the model, and where its weights are from."""
    config: dict[str, Any] = {
        "recipe": manifest.job.get("recipe"),
        "model": manifest.job.get("model", {}),
        "step": manifest.step,
        "averaged": weights.averaged,
        "dltrain_version": manifest.dltrain,
    }
    if weights.tied:
        config["tied_weights"] = weights.tied
    if "normalizer" in manifest.extra:
        config["normalizer"] = manifest.extra["normalizer"]
    return config


def _write(
    storage: Storage, manifest: Manifest, tensors: Mapping[str, str], out: Storage, file: str, tied: Mapping[str, str]
) -> str:
    """Write one safetensors file; its sha256."""
    entries = {name: manifest.tensors[fqn] for name, fqn in tensors.items()}
    items = sorted((Item(name, entry.dtype, entry.shape) for name, entry in entries.items()), key=order)
    metadata = {alias: name for alias, name in tied.items() if name in tensors}
    digest = hashlib.sha256()

    def chunks() -> Iterator[bytes | memoryview]:
        for chunk in _stream(storage, manifest, items, tensors, metadata):
            digest.update(chunk)
            yield chunk

    out.write(file, chunks())
    return digest.hexdigest()


def _stream(
    storage: Storage,
    manifest: Manifest,
    items: Sequence[Item],
    tensors: Mapping[str, str],
    metadata: Mapping[str, str],
) -> Iterator[bytes | memoryview]:
    yield header(items, metadata)
    for item in items:
        for block in blocks(storage, manifest, tensors[item.name]):
            yield block.view("u1").data


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
