"""From files and command lines of DeepSpeed and Accelerate to what they come to here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ...core.config import validate_values
from ...core.document import Document, parse_document, read_document
from ...core.errors import JobError, Problem
from ...core.zero import without_auto
from ..submit.ssh import Ssh
from .accelerate import by_name, take_accelerate
from .commands import Line, parse_accelerate, parse_deepspeed, take_launcher, take_passed
from .deepspeed import take_deepspeed
from .settings import Imported, Said, Settings, flatten

_DOCUMENTS = (".yaml", ".yml", ".json")
_ACCELERATES = ("distributed_type", "compute_environment", "num_machines", "num_processes", "fsdp_config")
_DEEPSPEEDS = (
    *("zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("fp16", "bf16", "optimizer", "scheduler", "gradient_clipping", "steps_per_print"),
)
_COMMENT = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*|#[^\n]*|/\*.*?\*/', re.DOTALL)
_LOCAL = ("localhost", "127.0.0.1")
_DEEPSPEED_ARGUMENTS = ("--deepspeed_config", "--deepspeed")  # what scripts call their JSON


def import_peers(words: Sequence[str]) -> Imported:
    """What the files ``words``, or a command line of ``accelerate launch`` or ``deepspeed``, come to here.

    Hostfiles are looked at first, then Accelerate's configurations, then DeepSpeed's, so that these know the ranks.

    Raises:
        JobError: a file cannot be read, is neither's, or cannot be meant for dltrain.
    """
    into = Imported()
    named: dict[str, Said] = {}
    line, files = _line(words)
    if line is not None:
        into.target = line.target
        files += [Path(name) for name in _configs(line.target)]
    hostfiles = [path for path in files if path.suffix not in _DOCUMENTS]
    documents = [(path, *_read(path)) for path in files if path.suffix in _DOCUMENTS]
    for path, said, whose in documents:
        if whose == "accelerate":
            named |= by_name(said)
            into.sources.append(str(path))
    launcher = {} if line is None else line.options
    if line is not None and words[0] == "accelerate":
        named |= {name: said for name, said in launcher.items() if name != "config_file"}
    zero = "distributed_type" in named and named["distributed_type"].value == "DEEPSPEED"
    for name in ("deepspeed_hostfile", "deepspeed_config_file") if zero else ():
        path = _beside(named.get(name))
        if path is not None and name == "deepspeed_hostfile":
            hostfiles.append(path)
        elif path is not None:
            documents.append((path, *_read(path)))
    for path in hostfiles:
        _hosts(path, into)
    if words[0] == "deepspeed":
        take_launcher(launcher, into)
    if named:
        settings = Settings(named)
        take_passed(settings, into)
        take_accelerate({name: named[name] for name in settings.left()}, into)
    for path, said, whose in documents:
        if whose == "deepspeed":
            native = cast("dict[str, Any]", _document(path).value)
            take_deepspeed(without_auto(native), said, into)
            into.sources.append(str(path))
    _drop_what_no_job_takes(into)
    return into


def _line(words: Sequence[str]) -> tuple[Line | None, list[Path]]:
    """The command line that ``words`` are, if any, and the files to read."""
    match words[0]:
        case "accelerate":
            line = parse_accelerate(words)
            config = line.options.get("config_file")
            return line, [] if config is None else [Path(config.value)]
        case "deepspeed":
            line = parse_deepspeed(words)
            hostfile = line.options.get("hostfile")
            return line, [Path(hostfile.value)] if hostfile is not None and hostfile.value else []
        case "torchrun":
            raise JobError(Problem("a torchrun line needs no import", hint="write dltrain launch in torchrun's place"))
        case _:
            return None, [Path(word) for word in words]


def _configs(target: Sequence[str]) -> list[str]:
    """DeepSpeed's JSON files among a script's arguments."""
    found: list[str] = []
    for index, word in enumerate(target):
        name, attached, value = word.partition("=")
        value = value if attached else next(iter(target[index + 1 : index + 2]), "")
        if name in _DEEPSPEED_ARGUMENTS and value.endswith(".json"):
            found.append(value)
    return found


def _beside(said: Said | None) -> Path | None:
    """A file that a configuration names, or None; a hostfile's ``null`` is written as text by some."""
    if said is None or said.value in (None, "", "null", "None"):
        return None
    path = Path(str(said.value))
    if path.is_file():
        return path
    other = Path(said.place.rpartition(":")[0]).parent / path  # samples name it from where they lie
    if other.is_file():
        return other
    raise JobError(Problem(f"no such file: '{path}'", str(said)))


def _read(path: Path) -> tuple[dict[str, Said], str]:
    """A document's values by dotted key, and whose it is."""
    document = _document(path)
    if isinstance(document.value, dict):
        keys = cast("Mapping[str, Any]", document.value).keys()
        for whose, known in (("accelerate", _ACCELERATES), ("deepspeed", _DEEPSPEEDS)):
            if any(key in known for key in keys):
                return flatten(document, str(path)), whose
    hint = f"the first has keys such as {_ACCELERATES[0]}, the second such as {_DEEPSPEEDS[0]}"
    raise JobError(Problem("neither Accelerate's configuration nor DeepSpeed's", str(path), hint))


def _document(path: Path) -> Document:
    """A file's document; DeepSpeed reads JSON with comments in it, which YAML would not."""
    if path.suffix != ".json" or not path.is_file():
        return read_document(path)
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    return parse_document(_COMMENT.sub(_blank, text), str(path))


def _blank(match: re.Match[str]) -> str:
    """A piece of JSON, or the lines of a comment without their words."""
    return match[0] if match[0].startswith('"') else "\n" * match[0].count("\n")


def _hosts(path: Path, into: Imported) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(Problem(f"cannot be read: {error}", str(path))) from None
    hosts = Ssh.read(path, Document(text)).hosts
    into.sources.append(str(path))
    into.put("resources.nodes", len(hosts), Said(str(path), "hosts", len(hosts)))
    slots = [host.slots for host in hosts if host.slots is not None]
    if slots:
        said = Said(str(path), "slots", min(slots))
        into.put("resources.nproc_per_node", min(slots), said)
        if len(set(slots)) > 1:
            into.leave(said, f"every node has as many ranks: the fewest slots, {min(slots)}, not up to {max(slots)}")
    if not all(host.name in _LOCAL for host in hosts):
        into.hostfile = path


def _drop_what_no_job_takes(into: Imported) -> None:
    """Leave out values that a job refuses, such as a learning rate below zero, with what it says to them."""
    if into.get("parallel.strategy") == "ddp":
        for key, neutral in (("parallel.offload", "none"), ("parallel.reshard", True), ("parallel.replicas", 1)):
            if into.get(key, neutral) != neutral:
                into.leave(into.values.pop(key)[1], f"{key} is for strategies that deal the weights out")
    _, faults = validate_values(_nested({key: value for key, (value, _) in into.values.items()}))
    for key, problem in faults:
        dotted = ".".join(key)
        for name in [name for name in into.values if f"{name}.".startswith(f"{dotted}.")]:
            into.leave(into.values.pop(name)[1], f"{dotted}: {problem.what}")


def native_json(into: Imported) -> str:
    """What is left for a DeepSpeed configuration, as its text."""
    return json.dumps(_nested({key: said.value for key, said in into.native.items()}), indent=2) + "\n"


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        below = tree
        for section in sections:
            below = below.setdefault(section, {})
        below[name] = value
    return tree
