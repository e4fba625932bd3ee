"""The options of ``dltrain launch`` from text to values, and what they cannot mean together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import Problem, did_you_mean

HELP = "see dltrain launch --help"

Streams = int | Mapping[int, int]

_ONE_LAUNCH = "run one dltrain launch for all nodes, with --address to join a cluster"
_OWN_RENDEZVOUS = "dltrain rendezvouses by itself"
_WITHOUT_EFFECT = {
    "rdzv_backend": _OWN_RENDEZVOUS,
    "rdzv_endpoint": _OWN_RENDEZVOUS,
    "rdzv_conf": _OWN_RENDEZVOUS,
    "node_rank": "dltrain numbers the nodes by itself",
    "local_addr": "dltrain finds the nodes' addresses by itself, --network-interface chooses among them",
    "monitor_interval": "dltrain sees at once that a rank ended",
    "numa_binding": "dltrain divides the cores among the ranks by itself",
    "run_path": "dltrain always runs a script inside its own interpreter",
}
_SCRIPT_ONLY = ("log_dir", "redirects", "tee", "local_ranks_filter", "role", "rdzv_id")
_OWN_LOADING = "the script itself decides what it loads; pass it an argument"
_JOB_ONLY = {
    "resume": _OWN_LOADING,
    "init_from": _OWN_LOADING,
    "strategy": "the script itself spreads its model; nothing is planned of it",
}


@dataclass
class Translated:
    """Options as values by the names of :class:`~.arguments.LaunchRequest`, only those given; notes and problems."""

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: list[str] = field(default_factory=list[str])
    problems: list[Problem] = field(default_factory=list[Problem])


def translate(params: Mapping[str, Any], *, is_job: bool) -> Translated:
    """Parse the options in ``params`` (by parameter name; None or False where not given) and check them together."""
    result = Translated()
    for name, parse in _PARSERS.items():
        if params[name] is None:
            continue
        try:
            result.values[name] = parse(params[name])
        except ValueError as error:
            result.problems.append(Problem(str(error), _option(name)))
    result.values |= {name: True for name in ("standalone", "quiet", "preflight") if params[name]}
    if params["start_method"] == "forkserver":
        result.notes.append("--start-method forkserver: the same as fork, dltrain forks from a server")
    given = {name for name, value in params.items() if value not in (None, False)}
    result.notes += [f"{_option(name)}: {why}; ignored" for name, why in _WITHOUT_EFFECT.items() if name in given]
    result.problems += _clashes(given, params, result.values)
    if is_job:
        what = "does nothing in a job, only for a script"
        result.problems += [Problem(what, _option(name)) for name in _SCRIPT_ONLY if name in given]
    else:
        what = "does nothing for a script, only in a job"
        result.problems += [Problem(what, _option(name), hint) for name, hint in _JOB_ONLY.items() if name in given]
    return result


def _clashes(given: set[str], params: Mapping[str, Any], values: Mapping[str, Any]) -> list[Problem]:
    problems: list[Problem] = []
    if "node_rank" in given and params["node_rank"].strip() != "0":
        problems.append(Problem("dltrain starts every node itself", "--node-rank", _ONE_LAUNCH))
    elif values.get("nodes", 1) != 1 and "address" not in given:
        per_node = [_option(name) for name in ("node_rank", "rdzv_endpoint") if name in given]
        if per_node:
            what = f"several nodes with {' and '.join(per_node)} mean one torchrun a node"
            problems.append(Problem(what, "--nodes", _ONE_LAUNCH))
    if values.get("keep_warm") and "address" not in given:
        what = "keeps nothing on the embedded cluster, which ends with the launch"
        hint = "start one with 'ray start --head' and join it with --address"
        problems.append(Problem(what, "--keep-warm", hint))
    if {"standalone", "address"} <= given:
        hint = "--standalone starts a cluster of its own, --address joins one"
        problems.append(Problem("cannot stand beside --address", "--standalone", hint))
    return problems


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _nodes(text: str) -> int | tuple[int, int]:
    """A number of nodes, or the least and the most as torchrun writes them: ``4:8``."""
    first, colon, last = text.partition(":")
    if not colon:
        return _count(text)
    least, most = _count(first), _count(last)
    if least > most:
        raise ValueError(f"the range {text} has no nodes in it: the least comes first")
    return most if least == most else (least, most)


def _per_node(text: str) -> int | str:
    return text if text in ("auto", "cpu", "gpu") else _count(text, also=", 'auto', 'cpu' or 'gpu'")


def _count(text: str, *, least: int = 1, also: str = "") -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(f"expected a whole number of at least {least}{also}, not '{text}'")
    return number


def _restarts(text: str) -> int | str:
    return text if text == "auto" else _count(text, least=0, also=" or 'auto'")


def _port(text: str) -> int:
    number = _count(text, least=0)
    if number > 65535:
        raise ValueError(f"no port has the number {text}")
    return number


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected {' or '.join(choices)}, not '{text}'")
        return text

    return parse


def _start_method(text: str) -> str:
    return "fork" if text == "forkserver" else _choice("fork", "spawn")(text)


def _address(text: str) -> str:
    if text != "auto" and not re.search(r":\d+/?$", text):
        raise ValueError(f"expected 'auto' or host:port of a Ray cluster, not '{text}'")
    return text


def _resume(text: str) -> str:
    if text in ("auto", "never") or "://" in text or Path(text).exists():
        return text
    hint = did_you_mean(text, ("auto", "never"))
    raise ValueError(f"no checkpoint at '{text}' ({hint})")


def _weights(text: str) -> str:
    if "://" in text or Path(text).exists():
        return text
    raise ValueError(f"no checkpoint at '{text}'")


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise ValueError(f"'{text}' is a file, not a folder")
    return path


def _duration(text: str) -> float:
    from ..core.spec import parse_duration

    return parse_duration(float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else text)


def _streams(text: str) -> Streams:
    """torchrun's ``Std`` syntax: ``3`` for all local ranks, or ``0:3,1:1`` by local rank."""
    if re.fullmatch(r"[0-3]", text):
        return int(text)
    if not re.fullmatch(r"\d+:[0-3](,\d+:[0-3])*", text):
        raise ValueError(f"expected 0 to 3 (1 stdout, 2 stderr, 3 both), or by local rank as 0:3,1:1, not '{text}'")
    return {int(rank): int(streams) for rank, _, streams in (part.partition(":") for part in text.split(","))}


def _ranks(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"expected local ranks such as 0,1, not '{text}'")
    return tuple(int(rank) for rank in text.split(","))


_PARSERS: dict[str, Callable[[str], Any]] = {
    "nodes": _nodes,
    "nproc_per_node": _per_node,
    "address": _address,
    "network_interface": str,
    "placement": _choice("auto", "spread", "pack"),
    "strategy": str,
    "run_dir": _folder,
    "resume": _resume,
    "init_from": _weights,
    "keep_warm": _duration,
    "submission": str,
    "max_restarts": _restarts,
    "start_method": _start_method,
    "log_dir": _folder,
    "redirects": _streams,
    "tee": _streams,
    "local_ranks_filter": _ranks,
    "master_addr": str,
    "master_port": _port,
    "role": str,
    "rdzv_id": str,
}
