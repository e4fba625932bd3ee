"""The failure report: one page instead of a wall of logs."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .messages import Exit, NodeInfo
from .policy import Decision, RankFailure

_TAIL_LINES = 20


@dataclass(frozen=True)
class Casualty:
    """One rank that failed, with what it left: its failure and the traceback it reported, if it could."""

    failure: RankFailure
    traceback: str
    log_dir: Path


def casualty_of(
    rank: int,
    node: int,
    exit_: Exit,
    said: dict[str, Any] | None,
    error_file: dict[str, Any] | None,
    log_dir: Path,
    *,
    speaks: bool,
) -> Casualty:
    """What ended a rank, from the best witness there is.

    Witnesses, best first: what our rank program said on its channel; the signal; the error file that
    torch.distributed.elastic's ``@record`` wrote; the exit code and the last line on standard error.

    Args:
        speaks: the program is ours, which tells of every end: without a word from it, it was gone abruptly.
    """
    if said is not None:
        failure = RankFailure(rank, node, said["at"], said["error"], said["what"], said["step"], said["phase"])
        return Casualty(failure, said["traceback"], log_dir)
    error, trace = f"exit code {exit_.code}", ""
    if exit_.signal is not None:
        error = signal.Signals(exit_.signal).name
        what = "killed by a signal"
        if exit_.signal == signal.SIGKILL:
            what += "; SIGKILL from outside often means out of memory"
    elif exit_.ok:
        error, what = "exit code 0 before the end", "it left without an error; nobody but dltrain may end a rank"
    elif error_file is not None:
        what, trace = _recorded(error_file)
    else:
        what = last_lines(log_dir / "stderr.log", 1)
    abrupt = exit_.signal is not None or speaks
    return Casualty(RankFailure(rank, node, exit_.at, error, what, abrupt=abrupt), trace, log_dir)


def _recorded(error_file: dict[str, Any]) -> tuple[str, str]:
    """Message and traceback of a ``@record`` error file: a text, or a mapping with ``extraInfo``."""
    message: Any = error_file.get("message", "")
    if isinstance(message, str):
        return message, ""
    extra: dict[str, Any] = message.get("extraInfo", {})
    return str(message.get("message", "")), str(extra.get("py_callstack", ""))


def report_text(
    decision: Decision,
    casualties: Sequence[Casualty],
    nodes: Sequence[NodeInfo],
    *,
    lost: Mapping[int, str],
    action: str,
    evidence: bool = True,
) -> str:
    """The report as text: cause first, then its traceback or last output, then who else fell, then what was done.

    Args:
        lost: what is known of each lost node.
        evidence: left out where the terminal has shown the ranks' output already.
    """
    lines = [f"The run failed: {decision.reason}."]
    ordered = sorted(casualties, key=lambda c: c.failure.order)
    if decision.culprit is None:
        for node, what in sorted(lost.items()):
            lines += ["", f"Node {node} ({_host(nodes, node)}):", *(f"  {line}" for line in what.splitlines())]
    elif ordered:
        lines += ["", *_first_failure(ordered.pop(0), nodes, evidence=evidence)]
    if ordered:
        others = [c.failure for c in ordered]
        lines += ["", "Then:"]
        lines += [
            f"  rank {f.rank} (node {f.node}): {f.error} {f.what.splitlines()[0] if f.what else ''}" for f in others
        ]
    lines += ["", f"Done about it: {action}"]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _first_failure(first: Casualty, nodes: Sequence[NodeInfo], *, evidence: bool) -> list[str]:
    failure = first.failure
    lines = [f"First failure: rank {failure.rank}, node {failure.node} ({_host(nodes, failure.node)})"]
    if failure.phase:
        step = f"step {failure.step}" if failure.step >= 0 else "before the first step"
        lines.append(f"  phase: {failure.phase}, {step}")
    lines.append(f"  error: {failure.error}{': ' + failure.what if failure.what else ''}")
    lines.append(f"  log:   {first.log_dir}")
    if evidence:
        text = first.traceback.rstrip() or last_lines(first.log_dir / "stderr.log", _TAIL_LINES)
        lines += ["", *(f"  {line}" for line in text.splitlines())] if text else []
    return lines


def _host(nodes: Sequence[NodeInfo], node: int) -> str:
    return nodes[node].hostname if node < len(nodes) else "?"


def report_json(decision: Decision, casualties: Sequence[Casualty], *, lost: Mapping[int, str], action: str) -> str:
    """The same for programs."""
    ranks = [
        {**c.failure.__dict__, "traceback": c.traceback, "log_dir": str(c.log_dir)}
        for c in sorted(casualties, key=lambda c: c.failure.order)
    ]
    report = {"reason": decision.reason, "action": action, "lost_nodes": dict(lost), "ranks": ranks}
    return json.dumps(report, indent=2) + "\n"


def last_lines(path: Path, count: int) -> str:
    """The end of a log file; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])
    except OSError:
        return ""
