"""What to do when something ends: a pure function from what is known to a decision. Actions are elsewhere."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

_ADDRESS = re.compile(r"\b0x[0-9a-f]+\b")  # of an object, as in its repr
_FRUITLESS = 3
_TOO_OFTEN = f"that happened {_FRUITLESS} times without a new step in between"
_AS_BEFORE = "the same as before, so another try would end alike"
_CRASHES = frozenset({"SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS", "SIGTRAP"})  # a process its own

_WITNESS_TIME = 0.3  # seconds to hear of other failures after the first, so that the report names the true first
_KNOWN_CAUSE = 0.1  # the same when one was killed: what the others say is a consequence
_UNKNOWN_CAUSE = 4.0  # the same when a connection broke, and who broke it is not known: a lost machine is after three
_TOLD_CAUSE = 10.0  # the same when a rank has told of its failure, and is still to end

Action = Literal["wait", "finish", "stopped", "restart", "regroup", "refuse", "fail"]


@dataclass(frozen=True)
class RankFailure:
    """How a rank failed.

    Attributes:
        at: Unix time in seconds at which it raised or died.
        error: class name of the exception, or name of the signal, or "exit code N".
        what: the exception's text.
        step: optimizer step it was in; -1 before the first.
        phase: what it was doing.
        witness: it only tells of what went wrong on another rank, or between the two.
        abrupt: it was gone without a word, by a signal or by leaving early, so others may have failed because of it; or
            it was stopped from outside.
        starved: it ran out of memory.
        final: trying again would end alike.
        refused: so would any try: the job itself is wrong.
    """

    rank: int
    node: int
    at: float
    error: str
    what: str = ""
    step: int = -1
    phase: str = ""
    witness: bool = False
    abrupt: bool = False
    starved: bool = False
    final: bool = False
    refused: bool = False

    @property
    def from_outside(self) -> bool:
        """Whether it is nothing that the program did, as far as can be told: it was killed or stopped, or cut off.

        A crash counts as such too: a machine may be the cause of one. So does a snapshot in memory of which parts are
        missing: the next start goes on from a checkpoint.
        """
        if self.starved or self.final or self.refused:
            return False
        if self.error == "CorruptCheckpoint" and self.step < 0:
            return True
        return self.witness or (self.abrupt and (self.error == "stall" or self.error in signal.Signals.__members__))

    @property
    def order(self) -> tuple[bool, bool, float]:
        """Sorts causes before consequences: the gone before those whose connection to them broke, then by time."""
        return (not self.abrupt, self.witness, self.at)


@dataclass(frozen=True)
class Stall:
    """No rank gets any further.

    Attributes:
        seconds: for how long.
        where: phase and step of those furthest behind.
        culprits: the ranks that hold up the others; none where all wait for each other.
    """

    seconds: float
    where: str
    culprits: tuple[RankFailure, ...] = ()


@dataclass(frozen=True)
class Status:
    """One generation of ranks as the controller sees it now.

    Attributes:
        world: number of ranks.
        ended: number of ranks that exited with code 0.
        failures: of ranks that did not, in the order they were noticed.
        lost_nodes: nodes whose agent is gone or of no use, and why in a few words.
        broken: what of the cluster itself has died, in a few words.
        complete: the program said that it has done all it was to do.
        stop_asked: the user asked for a stop.
        preempted: ranks that somebody else sent a signal to end, with its name.
        stall: what keeps all ranks from going on, though none has failed.
        regroup: ranks were asked to save and end, as there are nodes for more of them.
        fruitful: the generation has got beyond the newest step that any earlier one has got to.
    """

    world: int
    ended: int
    failures: tuple[RankFailure, ...] = ()
    lost_nodes: Mapping[int, str] = field(default_factory=dict[int, str])
    broken: str = ""
    complete: bool = False
    stop_asked: bool = False
    preempted: Mapping[int, str] = field(default_factory=dict[int, str])
    stall: Stall | None = None
    regroup: bool = False
    fruitful: bool = False


@dataclass(frozen=True)
class History:
    """Earlier generations of this run.

    Attributes:
        max_restarts: how many failures may be followed by another start; "auto" is as many as come from outside.
        culprits: the first failure of each generation that counted.
        replaces: the run has spare nodes, or may go on with fewer: losing one is no failure that counts.
        fruitless: how many of the last generations were ended one after the other, with no new step in between, by what
            has no number of its own: they lost a node, were told to end, or ended by what "auto" goes on after.
    """

    max_restarts: int | Literal["auto"]
    culprits: tuple[RankFailure | None, ...] = ()
    replaces: bool = False
    fruitless: int = 0

    @property
    def lately(self) -> tuple[RankFailure | None, ...]:
        """The first failures of the last generations, since one of them got anywhere."""
        return self.culprits[max(0, len(self.culprits) - self.fruitless) :]

    @property
    def goes_on(self) -> bool:
        """Whether there are ends after which ranks are started again."""
        return self.replaces or self.max_restarts != 0

    def times(self, *, fruitful: bool) -> int:
        """:attr:`fruitless` with one more generation: whether that got anywhere."""
        return 1 if fruitful else self.fruitless + 1

    def after(self, decision: Decision, *, lost: bool, fruitful: bool) -> History:
        """What it is after a generation that ``decision`` ended: whether it lost nodes, and whether it got anywhere."""
        unnumbered = not decision.counts or self.max_restarts == "auto"
        again = lost or (decision.action == "restart" and unnumbered)
        return replace(
            self,
            culprits=(*self.culprits, decision.culprit) if decision.counts else self.culprits,
            fruitless=self.times(fruitful=fruitful) if again else 0,
        )


@dataclass(frozen=True)
class Decision:
    """What to do, and why.

    Attributes:
        culprit: the first failure.
        counts: whether a restart is one of those that are allowed.
        signum: what ended a run that is stopped, if that was a signal to its ranks.
    """

    action: Action
    reason: str = ""
    culprit: RankFailure | None = None
    counts: bool = True
    signum: int = 0


def decide(status: Status, history: History) -> Decision:
    """The next move. Only ``wait`` leaves the generation alone; every other action ends it."""
    if status.ended == status.world:
        if status.preempted and not status.complete and not status.stop_asked:
            return _preempted(status, history)
        if status.complete or not (status.stop_asked or status.regroup):
            return Decision("finish")
        return Decision("stopped" if status.stop_asked else "regroup", counts=False)
    if status.broken:
        return Decision("stopped" if status.stop_asked else "fail", status.broken)
    if not status.failures and not status.lost_nodes and status.stall is None:
        return Decision("wait")
    stall = None if status.failures or status.lost_nodes else status.stall  # what is gone makes the others wait
    suspects = stall.culprits if stall is not None else status.failures
    culprit = min(suspects, key=lambda failure: failure.order, default=None)
    if culprit is not None and culprit.refused:
        # What an earlier generation has trained is a run that fails, and stays.
        return Decision("fail" if history.culprits else "refuse", culprit.what, culprit)
    if status.lost_nodes and not (culprit and culprit.abrupt and culprit.node not in status.lost_nodes):
        culprit = None  # ranks of a lost node took others with them
    reason = _reason(status, culprit) if stall is None else _stalled(stall, culprit)
    if status.stop_asked:
        return Decision("stopped", f"{reason}, while stopping", culprit)
    if culprit is not None and culprit.rank in status.preempted and not status.lost_nodes:
        return _preempted(status, history, culprit)
    if status.lost_nodes and culprit is None and history.replaces:
        if history.times(fruitful=status.fruitful) >= _FRUITLESS:
            return Decision("fail", f"{reason}; {_TOO_OFTEN}")
        return Decision("restart", reason, counts=False)
    if history.max_restarts == "auto":
        return _by_cause(status, history, reason, culprit)
    if len(history.culprits) >= history.max_restarts:
        return Decision("fail", reason, culprit)
    if culprit is not None and culprit.final:
        return Decision("fail", reason, culprit)
    if culprit is not None and any(_same_bug(culprit, earlier) for earlier in history.culprits):
        return Decision("fail", f"{reason}; {_AS_BEFORE}", culprit)
    return Decision("restart", reason, culprit)


def _by_cause(status: Status, history: History, reason: str, culprit: RankFailure | None) -> Decision:
    """What came from outside is gone on after, as long as the run gets on; what the program did ends it."""
    outside = culprit.from_outside if culprit is not None else bool(status.lost_nodes)
    if not outside:
        return Decision("fail", reason, culprit)
    if culprit is not None and any(_same_crash(culprit, earlier) for earlier in history.lately):
        return Decision("fail", f"{reason}; {_AS_BEFORE}", culprit)
    if history.times(fruitful=status.fruitful) >= _FRUITLESS:
        return Decision("fail", f"{reason}; {_TOO_OFTEN}", culprit)
    return Decision("restart", reason, culprit)


def patience(culprit: RankFailure | None, *, told: bool = False) -> float:
    """Seconds to hear of other failures after the first one, where this is the first of those known.

    Args:
        told: a rank that has not ended yet has told what it failed with, and that is not another's failure.
    """
    if culprit is not None and culprit.witness and told:
        return _TOLD_CAUSE
    if culprit is not None and culprit.witness and not culprit.final:
        return _UNKNOWN_CAUSE
    return _KNOWN_CAUSE if culprit is not None and culprit.abrupt else _WITNESS_TIME


def _preempted(status: Status, history: History, culprit: RankFailure | None = None) -> Decision:
    """Ranks were told to end by somebody else: that is no failure, and where restarts are allowed it costs none."""
    rank, name = min(status.preempted.items())
    others = f" (and {len(status.preempted) - 1} more)" if len(status.preempted) > 1 else ""
    reason = f"rank {rank}{others} was sent {name}"
    if culprit is not None:
        reason += f", and rank {culprit.rank} was gone before a checkpoint was saved ({culprit.error})"
    if not history.goes_on:
        return Decision("stopped", reason, culprit, signum=signal.Signals[name])
    if history.times(fruitful=status.fruitful) >= _FRUITLESS:
        return Decision("fail", f"{reason}; {_TOO_OFTEN}", culprit)
    return Decision("restart", reason, culprit, counts=False)


def _reason(status: Status, culprit: RankFailure | None) -> str:
    if culprit is not None:
        who = f"rank {culprit.rank} on node {culprit.node}"
        if culprit.witness and not culprit.final:
            return f"the connection of {who} to another broke, and nobody is known to have failed"
        return f"{who} failed with {culprit.error}"
    nodes: dict[str, list[str]] = {}
    for node, why in sorted(status.lost_nodes.items()):
        nodes.setdefault(why, []).append(str(node))
    return "; ".join(
        f"node {which[0]} was lost: {why}" if len(which) == 1 else f"nodes {', '.join(which)} were lost: {why}"
        for why, which in nodes.items()
    )


def _stalled(stall: Stall, culprit: RankFailure | None) -> str:
    if culprit is None:
        return f"no rank got any further for {stall.seconds:.0f} s: all wait for each other in {stall.where}"
    others = f" (and {len(stall.culprits) - 1} more)" if len(stall.culprits) > 1 else ""
    who = f"rank {culprit.rank} on node {culprit.node}{others}"
    why = ": its process is stopped" if culprit.abrupt else ""
    return f"{who} made no progress for {stall.seconds:.0f} s, in {culprit.phase} at step {culprit.step}{why}"


def _same_bug(failure: RankFailure, earlier: RankFailure | None) -> bool:
    """The same exception, or standing still, at the same step is a bug in the program, not an accident.

    From which checkpoint or snapshot the ranks came to that step is all the same, and so are addresses in texts.
    """
    return (
        earlier is not None
        and (not failure.abrupt or failure.starved)
        and failure.step >= 0
        and (failure.error, failure.step) == (earlier.error, earlier.step)
        and _ADDRESS.sub("", failure.what) == _ADDRESS.sub("", earlier.what)
    )


def _same_crash(failure: RankFailure, earlier: RankFailure | None) -> bool:
    """A signal that a process brings upon itself, twice at the same step or twice before the first, is a bug too."""
    return (
        earlier is not None
        and failure.error in _CRASHES
        and (failure.error, failure.step) == (earlier.error, earlier.step)
    )
