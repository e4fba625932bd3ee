"""What the commands of ``dltrain checkpoint`` print."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.clear import carry_out, plan
from ..checkpoint.compare import Side, compare
from ..checkpoint.describe import Listed, best_metrics, listing, named_like, tensor_bytes, written_by
from ..checkpoint.export import convert
from ..checkpoint.lease import release, take
from ..checkpoint.locate import Place, choose, locate, open_chosen, reading, steps_of
from ..checkpoint.manifest import Manifest, TensorEntry, folder_name
from ..checkpoint.verify import verify
from ..checkpoint.weights import select
from ..core.document import parse_value
from ..core.errors import JobError, Problem
from ..core.spec import parse_duration
from ..launcher.rundir import RunDir
from .render import columns, data_size, parse_size
from .storage_options import options_for

#: Storage options of the URLs among a command's places.
Options = Mapping[str, Any]


def list_checkpoints(source: str, options: Options, *, as_json: bool) -> None:
    """Print the checkpoints at ``source``, newest first.

    Raises:
        JobError: there is none, or they cannot be read.
    """
    place = locate(source, options)
    found = listing(place)
    if not found:
        choose(place)  # which says what there is instead
    if as_json:
        _print_json([_listed_json(item) for item in found])
        return
    rows = [("step", "completed (UTC)", "size", "written by", "best so far", "")]
    for item in found:
        when = f"{item.created:%Y-%m-%d %H:%M:%S}" if item.created else "-"
        best = ", ".join(f"{name} {value:.4g}" for name, value in (item.best or {}).items())
        state = f"{item.state}: {item.why}" if item.why else item.state
        rows.append((str(item.step), when, data_size(item.bytes), item.written_by or "-", best or "-", state))
    sys.stdout.write(columns(rows, right=(0, 2)))


def show_checkpoint(source: str, step: int | None, match: Sequence[str], options: Options, *, as_json: bool) -> None:
    """Print a checkpoint's job, position and tensors.

    Raises:
        JobError: there is no such checkpoint, it cannot be read, or no tensor is named like a pattern of ``match``.
    """
    place = locate(source, options)
    manifest = open_chosen(place, step)
    tensors = {name: manifest.tensors[name] for name in named_like(manifest.tensors, match, place.source)}
    if as_json:
        _print_json(_manifest_json(manifest, tensors))
        return
    facts = [
        ("checkpoint", f"{place.storage}/{folder_name(manifest.step)}"),
        ("completed", f"{manifest.created:%Y-%m-%d %H:%M:%S} UTC, by dltrain {manifest.dltrain}"),
        ("written by", written_by(manifest)),
        ("position", _position(manifest)),
        ("job", _job_line(manifest)),
        *((f"best {name}", f"{value:.6g}") for name, value in best_metrics(manifest).items()),
        *((f"tracking {name}", str(value)) for name, value in manifest.tracking.items()),
    ]
    sys.stdout.write(columns(facts) + "\n")
    rows = [("tensor", "shape", "dtype", "pieces", "size")]
    for name, entry in tensors.items():
        shape = "[" + ", ".join(map(str, entry.shape)) + "]"
        rows.append((name, shape, entry.dtype, str(len(entry.pieces)), data_size(tensor_bytes([entry]))))
    sys.stdout.write(columns(rows, right=(3, 4)) + "\n")
    files = {piece.file for entry in manifest.tensors.values() for piece in entry.pieces}
    shown = f"{len(tensors):,} of {len(manifest.tensors):,} tensors" if match else f"{len(tensors):,} tensors"
    size = data_size(tensor_bytes(tensors.values()))
    sys.stdout.write(f"{shown}, {size}; the checkpoint has {len(files)} shard file{'s'[: len(files) != 1]}\n")


def verify_checkpoints(source: str, step: int | None, options: Options, *, every: bool) -> int:
    """Print what is wrong with a checkpoint, or with all of them; the exit code, 1 if anything is.

    Raises:
        JobError: there is no such checkpoint, or it cannot be read, or is of a newer format.
    """
    place = locate(source, options)
    if every and (step is not None or place.named is not None):
        raise JobError(Problem("'--all' is every checkpoint, a step is one", "--all", "give one of the two"))
    chosen = choose(place, step)
    faulty = 0
    for each in steps_of(place) if every else [chosen]:
        faults = 0
        with reading(place.source):
            for damage in verify(place.storage, each):
                faults += 1
                sys.stdout.write(f"{damage}\n")
        faulty += bool(faults)
        things = (
            f"{faults} thing{'s'[: faults != 1]} wrong" if faults else "whole: every byte of its shards is as written"
        )
        sys.stdout.write(f"{folder_name(each)}: {things}\n")
    return 1 if faulty else 0


def diff_checkpoints(
    one: str, other: str, step: int | None, match: Sequence[str], options: Options, *, as_json: bool
) -> int:
    """Print how two checkpoints differ; the exit code, 1 if they do.

    Raises:
        JobError: one of the two is not there, or cannot be read, or neither has a tensor named like a pattern.
    """
    sides = [_side(source, step, options) for source in (one, other)]
    if match:
        names = sorted({name for side in sides for name in side.names})
        wanted = set(named_like(names, match, f"{one} and {other}"))
        sides = [replace(side, names=[name for name in side.names if name in wanted]) for side in sides]
    with reading(f"{one} and {other}"):
        found = list(compare(*sides))
    if as_json:
        _print_json([asdict(item) for item in found])
        return 1 if found else 0
    count = len({name for side in sides for name in side.names})
    if found:
        rows: list[Sequence[str]] = [("tensor", "max abs", "max rel", "differing", "of", "")]
        for item in found:
            measured = item.kind in ("values", "dtype")
            figures = (f"{item.max_abs:.3g}", f"{item.max_rel:.3g}", f"{item.differing:,}") if measured else ("-",) * 3
            nans = f"{item.nans:,} NaN on one side" if item.nans else ""
            rows.append((item.name, *figures, f"{item.elements:,}", "; ".join(filter(None, (item.what, nans)))))
        sys.stdout.write(columns(rows, right=(1, 2, 3, 4)) + "\n")
    sys.stdout.write(f"{len(found):,} of {count:,} tensors differ\n" if found else f"all {count:,} tensors are alike\n")
    return 1 if found else 0


def convert_checkpoint(
    source: str,
    target: str,
    step: int | None,
    options: Options,
    *,
    part: str | None,
    ema: bool,
    shard_size: str | None,
    force: bool,
) -> None:
    """Write a checkpoint's weights to ``target`` and name the files.

    Raises:
        JobError: there is no such checkpoint or part, or ``target`` cannot be written or is taken.
    """
    size = None if shard_size is None else parse_size(shard_size, "--max-shard-size")
    place = locate(source, options)
    manifest = open_chosen(place, step)
    weights = select(manifest, part=part, averaged=ema)
    with reading(source):
        written = convert(
            place.storage, manifest, weights, target, shard_size=size, force=force, options=options_for(target, options)
        )
    tensors = weights.once()
    total = data_size(tensor_bytes(manifest.tensors[fqn] for fqn in tensors.values()))
    kind = "averaged weights" if ema else "weights"
    sys.stdout.write(f"{len(tensors):,} tensors, {total}: the {kind} after step {manifest.step:,}\n")
    for alias, name in weights.tied.items():
        sys.stdout.write(f"{alias} is tied to {name}, and stored as that one\n")
    for file in written:
        sys.stdout.write(f"wrote {file}\n")


def clear_checkpoints(source: str, options: Options, *, keep: int | None, older_than: str, yes: bool) -> None:
    """Print what could be removed, or remove it.

    Raises:
        JobError: ``older_than`` is no time, the folder cannot be read, or its run is in use.
    """
    try:
        seconds = parse_duration(parse_value(older_than))
    except ValueError as error:
        raise JobError(Problem(str(error), "--older-than")) from None
    place = locate(source, options)
    with _alone(place) if yes else contextlib.nullcontext():
        found = plan(place, keep=keep, older_than=seconds, now=time.time())
        for note in found.notes:
            sys.stdout.write(f"{note}\n")
        if found.removals:
            rows = [(folder_name(item.step), data_size(item.bytes), item.why) for item in found.removals]
            sys.stdout.write(columns(rows, right=(1,)))
        total = data_size(sum(item.bytes for item in found.removals))
        if yes:
            with reading(source):
                carry_out(place.storage, found)
    count = f"{len(found.removals)} checkpoint folder{'s'[: len(found.removals) != 1]}"
    if yes or not found.removals:
        sys.stdout.write(f"removed {count}, {total}\n" if found.removals else "there is nothing to remove\n")
    else:
        sys.stdout.write(f"would remove {count}, {total}; '--yes' does it\n")


@contextlib.contextmanager
def _alone(place: Place) -> Generator[None]:
    """Keep every run out of the folder meanwhile, this machine's and others'.

    Raises:
        JobError: one is at work there.
    """
    with held(place.run):
        say = partial(print, file=sys.stderr)
        token = take(place.storage, f"gc-{os.getpid()}", pid=os.getpid(), on_message=say, where=place.source)
        try:
            yield
        finally:
            release(place.storage, token)


@contextlib.contextmanager
def held(run: Path | None) -> Generator[None]:
    """Keep launches off a run directory meanwhile.

    Raises:
        JobError: a launch is using it.
    """
    lock = None if run is None else RunDir.reopen(run)
    if run is not None and lock is None:
        raise JobError(Problem("the run is in use by a launch, or its run.json is damaged", str(run)))
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _side(source: str, step: int | None, options: Options) -> Side:
    place = locate(source, options)
    manifest = open_chosen(place, step)
    return Side(place.storage, manifest, tuple(manifest.tensors))


def _position(manifest: Manifest) -> str:
    cursor = manifest.cursor
    return f"step {cursor.step:,} of {manifest.total_steps:,}, {cursor.samples:,} samples"


def _job_line(manifest: Manifest) -> str:
    """The job's name and its model, in a line; whatever wrote the manifest."""
    job = manifest.job
    model = json.dumps(job.get("model") or {}, ensure_ascii=False)
    return f"{job.get('name', '-')}, recipe {job.get('recipe', '-')} {model}, seed {job.get('seed', '-')}"


def _listed_json(item: Listed) -> dict[str, Any]:
    return {
        "step": item.step,
        "state": item.state,
        "bytes": item.bytes,
        "created": item.created.isoformat() if item.created else None,
        "written_by": item.written_by or None,
        "best": dict(item.best or {}),
        "why": item.why or None,
    }


def _manifest_json(manifest: Manifest, tensors: dict[str, TensorEntry]) -> dict[str, Any]:
    whole = manifest.model_dump(mode="json", exclude={"tensors"})
    return whole | {
        "bytes": tensor_bytes(tensors.values()),
        "tensors": {
            name: {"shape": list(e.shape), "dtype": e.dtype, "pieces": len(e.pieces), "bytes": tensor_bytes([e])}
            for name, e in tensors.items()
        },
    }


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    """``value`` with the numbers that JSON does not have as the texts "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
