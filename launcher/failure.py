"""The failure report: one page instead of a wall of logs."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core.memory import in_words
from .messages import Exit, NodeInfo
from .policy import Decision, RankFailure
from .stall import Standstill

_TAIL_LINES = 20


@dataclass(frozen=True)
class Casualty:
    """One rank that failed, with what it left.

    Attributes:
        traceback: what it reported, if it could.
        hints: lines about the error for people.
        details: what else is known, for programs; JSON-able.
    """

    failure: RankFailure
    traceback: str
    log_dir: Path
    hints: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])


def casualty_of(
    rank: int,
    node: int,
    exit_: Exit,
    said: dict[str, Any] | None,
    traces: Mapping[str, Any],
    log_dir: Path,
    *,
    speaks: bool,
    remedies: Sequence[str] = (),
) -> Casualty:
    """What ended a rank, from the best witness there is.

    Witnesses, best first: what our rank program said on its channel; the signal; the error file that
    torch.distributed.elastic's ``@record`` wrote; the exit code and the last line on standard error.

    Args:
        traces: what the agent found: that ``error_file``, ``step`` and ``phase`` of the last mark, and ``oom_kills``:
            how many processes the kernel has just killed for want of memory, in the rank's control group and on the
            machine.
        remedies: what would let ranks hold less memory.
        speaks: the program is ours, which tells of every end: without a word from it, it was gone abruptly.
    """
    if said is not None:
        kinds = {name: said[name] for name in ("step", "phase", "final", "witness")}
        failure = RankFailure(rank, node, said["at"], said["error"], said["what"], **kinds, starved=bool(said["hints"]))
        return Casualty(failure, said["traceback"], log_dir, said["hints"], said["details"])
    error_file: dict[str, Any] | None = traces["error_file"]
    error, trace, starved = f"exit code {exit_.code}", "", False
    if exit_.signal is not None:
        error = signal.Signals(exit_.signal).name
        what, starved = _killed(exit_, traces["oom_kills"])
    elif exit_.ok:
        error, what = "exit code 0 before the end", "it left without an error; nobody but dltrain may end a rank"
    elif error_file is not None:
        what, trace = _recorded(error_file)
    else:
        what = last_lines(log_dir / "stderr.log", 1)
    abrupt = exit_.signal is not None or speaks
    step, phase = (traces["step"], traces["phase"]) if speaks else (-1, "")
    failure = RankFailure(rank, node, exit_.at, error, what, step, phase, abrupt=abrupt, starved=starved)
    hints = [f"it held at most: {in_words(exit_.max_rss)}", *(f"would help: {remedy}" for remedy in remedies)]
    return Casualty(failure, trace, log_dir, hints if starved else ())


def _killed(exit_: Exit, oom_kills: tuple[int, int]) -> tuple[str, bool]:
    """What a signal says, and whether memory had run out."""
    if exit_.signal != signal.SIGKILL:
        return "killed by a signal", False
    of_group, of_machine = oom_kills
    if of_group:
        return "killed by the kernel, since its control group ran out of memory", True
    if of_machine:
        return "probably killed by the kernel: the machine ran out of memory, and it killed a process for that", True
    return "killed by somebody, not by the kernel for want of memory, as far as that counts such kills here", False


def _recorded(error_file: dict[str, Any]) -> tuple[str, str]:
    """Message and traceback of a ``@record`` error file: a text, or a mapping with ``extraInfo``."""
    message: Any = error_file.get("message", "")
    if isinstance(message, str):
        return message, ""
    extra: dict[str, Any] = message.get("extraInfo", {})
    return str(message.get("message", "")), str(extra.get("py_callstack", ""))


def blamed(standstill: Standstill | None, logs: Callable[[int], Path]) -> list[Casualty]:
    """The ranks that a stall is blamed on, with their stacks; ``logs`` gives a rank's log folder."""
    if standstill is None:
        return []
    looks = standstill.looks
    return [
        Casualty(failure, looks[failure.rank].stacks if failure.rank in looks else "", logs(failure.rank))
        for failure in standstill.stall.culprits
    ]


@dataclass(frozen=True)
class Cost:
    """What a failure cost.

    Attributes:
        from_step: the step that the ranks went on from.
        origin: what they went on from, in words; empty where it was nothing.
        steps: steps done again.
        seconds: time without a new step.
    """

    from_step: int
    origin: str
    steps: int
    seconds: float

    @property
    def again(self) -> str:
        """How many steps were done again, in words."""
        return f"{self.steps} step{'' if self.steps == 1 else 's'} done again"

    @property
    def source(self) -> str:
        """Where the ranks went on, as "from step 137, in memory of 4 ranks"."""
        return f"from step {self.from_step}, {self.origin}" if self.origin else "from the beginning"


@dataclass(frozen=True)
class Report:
    """One generation's failure.

    Attributes:
        casualties: the ranks that failed, or that a stall is blamed on, causes before consequences.
        lost: what is known of each lost node.
        action: what was done about it.
        standstill: if it is a stall: where the living ranks were, and what was seen of them.
        reached: completed steps at the failure.
        at: Unix time of the failure in seconds.
        checkpoint: step of the newest checkpoint then; None where there was none.
        cost: known once a new step has been made.
    """

    generation: int
    decision: Decision
    casualties: Sequence[Casualty]
    nodes: Sequence[NodeInfo]
    lost: Mapping[int, str]
    action: str
    standstill: Standstill | None = None
    reached: int = 0
    at: float = 0.0
    checkpoint: int | None = None
    cost: Cost | None = None

    def text(self, *, evidence: bool = True) -> str:
        """For people: the cause, its traceback or stack or last output, who else fell or waited, and what was done.

        Args:
            evidence: left out where the terminal has shown the ranks' output already.
        """
        lines = [f"{self.headline()}: {self.decision.reason}."]
        ordered = list(self.casualties)
        if self.decision.culprit is None:
            for node, what in sorted(self.lost.items()):
                lines += ["", f"Node {node} ({self._host(node)}):", *(f"  {line}" for line in what.splitlines())]
        elif ordered:
            lines += ["", *self._first_failure(ordered.pop(0), evidence=evidence)]
        if ordered:
            lines += ["", "Then:", *(_one_line(casualty.failure) for casualty in ordered)]
        lines += self._others()
        lines += ["", f"Done about it: {self.action}", *self._cost()]
        return "\n".join(line.rstrip() for line in lines) + "\n"

    @property
    def preempted(self) -> bool:
        """Whether ranks were told to end by somebody else, which is no failure."""
        return (not self.decision.counts and not self.lost) or bool(self.decision.signum)

    def headline(self) -> str:
        """What it comes to, in a few words."""
        if self.preempted:
            return "Preempted"
        if self.decision.action == "fail":
            return "The run failed"
        return "A failure" if self.cost is None else "A failure, recovered from"

    def level(self) -> Literal["INFO", "WARN", "ERROR"]:
        """How much it should alarm people."""
        if self.preempted:
            return "INFO"
        return "ERROR" if self.decision.action == "fail" else "WARN"

    def json(self) -> str:
        """The same for programs."""
        ranks = [
            {
                **asdict(c.failure),
                "traceback": c.traceback,
                "log_dir": str(c.log_dir),
                "hints": list(c.hints),
                **c.details,
            }
            for c in self.casualties
        ]
        report = {
            "generation": self.generation,
            "reason": self.decision.reason,
            "preempted": self.preempted,
            "action": self.action,
            "lost_nodes": dict(self.lost),
            "ranks": ranks,
            "step": self.reached,
            "checkpoint": self.checkpoint,
            "cost": asdict(self.cost) if self.cost else None,
            "stalled": self._stalled(),
        }
        return json.dumps(report, indent=2) + "\n"

    def _stalled(self) -> list[dict[str, Any]]:
        """All living ranks at a stall: where, for how many seconds, and their stacks or why there are none."""
        if self.standstill is None:
            return []
        looks = self.standstill.looks
        return [
            {
                "rank": place.rank,
                "node": place.node,
                "step": place.step,
                "phase": place.phase,
                "seconds": place.still,
                "stacks": looks[place.rank].stacks or looks[place.rank].why_silent() if place.rank in looks else "",
            }
            for place in self.standstill.places
        ]

    def _first_failure(self, first: Casualty, *, evidence: bool) -> list[str]:
        failure = first.failure
        lines = [f"First failure: rank {failure.rank}, node {failure.node} ({self._host(failure.node)})"]
        if failure.phase:
            step = f"step {failure.step}" if failure.step >= 0 else "before the first step"
            lines.append(f"  phase: {failure.phase}, {step}")
        lines.append(f"  error: {failure.error}{': ' + failure.what if failure.what else ''}")
        lines += [f"  {hint}" for hint in first.hints]
        lines.append(f"  log:   {first.log_dir}")
        if evidence:
            text = first.traceback.rstrip() or last_lines(first.log_dir / "stderr.log", _TAIL_LINES)
            lines += ["", *(f"  {line}" for line in text.splitlines())] if text else []
        return lines

    def _others(self) -> list[str]:
        """Where the ranks were that a stall is not blamed on; those with the same stack together."""
        if self.standstill is None:
            return []
        blamed = {casualty.failure.rank for casualty in self.casualties}
        alike: dict[tuple[str, str], list[int]] = {}
        for place in self.standstill.places:
            if place.rank not in blamed:
                look = self.standstill.looks.get(place.rank)
                shown = look.main or look.why_silent() if look else "its node did not answer"
                alike.setdefault((str(place), shown), []).append(place.rank)
        lines: list[str] = []
        for (where, shown), ranks in alike.items():
            who = f"Rank {ranks[0]} waits" if len(ranks) == 1 else f"Ranks {', '.join(map(str, ranks))} wait"
            lines += ["", f"{who} in {where}:", *(f"  {line}" for line in shown.splitlines())]
        return lines

    def _cost(self) -> list[str]:
        if self.cost is not None:
            cost = self.cost
            return [f"It went on {cost.source}: {cost.again}, {cost.seconds:.1f} s"]
        if self.decision.action != "fail" or not self.reached:
            return []
        if self.checkpoint is None:
            return [f"Lost: all {self.reached} steps, as there is no checkpoint"]
        lost = max(0, self.reached - self.checkpoint)
        return [f"Lost: {lost} steps since the newest checkpoint, of step {self.checkpoint}"]

    def _host(self, node: int) -> str:
        return self.nodes[node].hostname if node < len(self.nodes) else "?"


def _one_line(failure: RankFailure) -> str:
    what = failure.what.splitlines()[0] if failure.what else ""
    return f"  rank {failure.rank} (node {failure.node}): {failure.error} {what}"


def last_lines(path: Path, count: int) -> str:
    """The end of a log file; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])
    except OSError:
        return ""
