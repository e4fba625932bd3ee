"""``dltrain config import``: what Accelerate and DeepSpeed were told, as a job file and a command."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.job import Job
from ..core.schema import leaves
from ..launcher.peers.read import import_peers, native_json
from ..launcher.peers.settings import Imported, Said
from .config import commented_yaml
from .starter import write_starter

_WIDTH = 100
_SHOWN = 40  # characters of a value in a comment
_FOR_DEEPSPEED = "with -o it goes into a DeepSpeed file that parallel.deepspeed names"


def import_peer_files(words: Sequence[str], output: Path | None, *, force: bool) -> None:
    """Write (or print, without ``output``) the job that ``words`` come to, and say how to run a script as before.

    Raises:
        JobError: a file is not what it should be, or ``output`` exists and ``force`` is not given.
    """
    found = import_peers(words)
    if output is None:
        for said in found.native.values():
            found.leave(said, _FOR_DEEPSPEED)
        sys.stdout.write("".join(f"{line}\n" for line in job_text(found)))
        return
    beside = output.with_suffix(".deepspeed.json")
    if found.native:
        native = Said(str(beside), f"{len(found.native)} of DeepSpeed's own settings", str(beside))
        found.put("parallel.deepspeed", str(beside), native)
    write_starter(output, "\n".join(job_text(found)) + "\n", name="job.yaml", force=force)
    if found.native:
        write_starter(beside, native_json(found), name=beside.name, force=force)
    told = [f"wrote {output}" + (f" and {beside}" if found.native else ""), *_left(found)]
    told += ["", "next:", *_indented(command(found)), f"  dltrain config show {output}"]
    sys.stdout.write("".join(f"{line}\n" for line in told))


def job_text(found: Imported) -> Iterator[str]:
    """The lines of a job file: the command for a script, the values with what they come from, and what is left."""
    yield f"# What {', '.join(found.sources) or 'the command line'} comes to in dltrain."
    yield "#"
    yield "# Your script as it is, on as many nodes and ranks:"
    yield from (f"#   {line}" for line in command(found))
    yield "#"
    yield "# A job in the script's place: name a recipe and data here, and launch this file (dltrain config init shows"
    yield "# every key)."
    order = {".".join(key): number for number, (key, _) in enumerate(leaves(Job))}
    values = sorted(found.values.items(), key=lambda item: order[item[0]])
    yield from commented_yaml((tuple(key.split(".")), value, _from(said)) for key, (value, said) in values)
    yield from (f"# {line}".rstrip() for line in _left(found))


def command(found: Imported) -> list[str]:
    """The command that runs the script, in the lines of a shell."""
    nodes, ranks = found.get("resources.nodes", 1), found.get("resources.nproc_per_node")
    words = ["dltrain", "launch"]
    if found.hostfile is not None:
        words = ["dltrain", "submit", "--cluster", str(found.hostfile)]
    elif nodes > 1:
        words += ["--address", "auto"]
    words += ["--nodes", str(nodes)] if nodes > 1 else []
    words += ["--nproc-per-node", str(ranks)] if ranks is not None else []
    last = shlex.join([*words, *found.options, *found.target])
    if not found.environment:
        return [last]
    pairs = [f"{name}={shlex.quote(value)}" for name, value in found.environment.items()]
    rows = textwrap.wrap(" ".join(pairs), _WIDTH - 10, break_long_words=False, break_on_hyphens=False)
    return ["env \\", *(f"  {row} \\" for row in rows), f"  {last}"]


def _left(found: Imported) -> Iterator[str]:
    if found.without:
        yield from ("", "without an equivalent in a job:")
    for why, said in found.without.items():
        yield from _listed(f"{why}:", [f"{one} {_shown(one.value)}" for one in said])
    if found.unknown:
        yield from ("", "not known to dltrain, and not taken:")
    for said, hint in found.unknown:
        yield f"  {said} {_shown(said.value)}" + (f" ({hint})" if hint else "")


def _listed(why: str, items: Iterable[str]) -> Iterator[str]:
    yield f"  {why}"
    yield from (f"    {item}" for item in items)


def _from(said: Said) -> str:
    return f"{said}: {_shown(said.value)}"


def _shown(value: Any) -> str:
    return textwrap.shorten(value if isinstance(value, str) else json.dumps(value), _SHOWN, placeholder=" …")


def _indented(lines: Iterable[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)
