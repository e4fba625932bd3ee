"""What to do when something ends: the table of cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dltrain.launcher.policy import Decision, History, RankFailure, Stall, Status, decide, patience

RAISED = RankFailure(rank=1, node=0, at=10.0, error="ValueError", what="no", step=7, phase="forward")
KILLED = RankFailure(rank=2, node=1, at=11.0, error="SIGKILL", abrupt=True)
REFUSED = RankFailure(rank=0, node=0, at=9.0, error="JobError", what="train longer", refused=True)
STUCK = RankFailure(rank=3, node=1, at=8.0, error="stall", what="no progress in data", step=7, phase="data")
STOPPED = replace(STUCK, what="its process is stopped", abrupt=True)
STARVED = replace(KILLED, step=7, what="killed by the kernel", starved=True)
AT_1, AT_2 = (replace(RAISED, what=f"<Net object at 0x7f{last}> has no x") for last in ("0a1", "9c2"))
FINAL = replace(RAISED, final=True)
GONE = replace(KILLED, rank=1)
TOLD = {1: "SIGTERM"}
STALL = Stall(12.0, "data, step 7", (STUCK,))
LOST = {1: "its agent died"}


def status(**changes: object) -> Status:
    return replace(Status(world=4, ended=0), **changes)  # pyright: ignore[reportArgumentType]  # names of fields


def history(restarts: int = 0, *culprits: RankFailure | None) -> History:
    return History(restarts, culprits)


def auto(*culprits: RankFailure | None, fruitless: int = 0) -> History:
    return History("auto", culprits, fruitless=fruitless)


@pytest.mark.parametrize(
    ("seen", "before", "action", "reason", "culprit"),
    [
        # nothing is wrong
        (status(), history(), "wait", "", None),
        (status(ended=3), history(), "wait", "", None),
        (status(ended=4), history(), "finish", "", None),
        (status(stop_asked=True), history(), "wait", "", None),
        (status(ended=4, stop_asked=True), history(), "stopped", "", None),
        (status(ended=4, stop_asked=True, complete=True), history(), "finish", "", None),
        # one rank fails
        (status(failures=(RAISED,)), history(), "fail", "rank 1 on node 0 failed with ValueError", RAISED),
        (status(failures=(RAISED,)), history(2), "restart", "rank 1 on node 0 failed with ValueError", RAISED),
        (status(failures=(KILLED,)), history(2, RAISED), "restart", "rank 2 on node 1 failed with SIGKILL", KILLED),
        (status(failures=(KILLED,)), history(2, KILLED, RAISED), "fail", "failed with SIGKILL", KILLED),
        (status(failures=(RAISED,), stop_asked=True), history(2), "stopped", "ValueError, while stopping", RAISED),
        (status(failures=(REFUSED,)), history(2), "refuse", "train longer", REFUSED),
        (status(failures=(REFUSED,)), history(2, KILLED), "fail", "train longer", REFUSED),  # others have trained
        # the same bug again
        (status(failures=(RAISED,)), history(5, RAISED), "fail", "another try would end alike", RAISED),
        (status(failures=(RAISED,)), history(5, None, RAISED), "fail", "another try would end alike", RAISED),
        (status(failures=(AT_1,)), history(5, AT_2), "fail", "another try would end alike", AT_1),
        (status(failures=(RAISED,)), history(5, replace(RAISED, step=8)), "restart", "ValueError", RAISED),
        (status(failures=(RAISED,)), history(5, replace(RAISED, what="yes")), "restart", "ValueError", RAISED),
        (status(failures=(KILLED,)), history(5, KILLED), "restart", "SIGKILL", KILLED),  # no step: an accident
        (status(failures=(STARVED,)), history(5, STARVED), "fail", "another try would end alike", STARVED),
        (status(failures=(FINAL,)), history(5), "fail", "rank 1 on node 0 failed with ValueError", FINAL),
        # a node is taken away: no failure
        (status(preempted=TOLD), history(2), "wait", "", None),
        (status(ended=4, preempted=TOLD), history(2, RAISED), "restart", "rank 1 was sent SIGTERM", None),
        (status(ended=4, preempted=TOLD), history(), "stopped", "rank 1 was sent SIGTERM", None),
        (status(ended=4, preempted=TOLD, complete=True), history(), "finish", "", None),
        (status(ended=4, preempted=TOLD, stop_asked=True), history(2), "stopped", "", None),
        (status(ended=4, preempted=TOLD), History(1, fruitless=1), "restart", "rank 1 was sent SIGTERM", None),
        (status(ended=4, preempted=TOLD), History(1, fruitless=2), "fail", "3 times without a new step", None),
        (status(ended=4, preempted=TOLD, fruitful=True), History(1, fruitless=2), "restart", "sent SIGTERM", None),
        (status(preempted=TOLD, failures=(GONE,)), history(1, RAISED), "restart", "rank 1 was gone before", GONE),
        (status(preempted=TOLD, failures=(KILLED,)), history(1, RAISED), "fail", "rank 2 on node 1 failed", KILLED),
        # cause and consequence
        (status(failures=(RAISED, KILLED)), history(), "fail", "rank 2 on node 1 failed with SIGKILL", KILLED),
        (status(failures=(replace(RAISED, at=12.0, rank=3), RAISED)), history(), "fail", "rank 1 on", RAISED),
        # a stall
        (
            status(stall=STALL),
            history(),
            "fail",
            "rank 3 on node 1 made no progress for 12 s, in data at step 7",
            STUCK,
        ),
        (status(stall=STALL), history(1), "restart", "made no progress", STUCK),
        (status(stall=STALL), history(5, STUCK), "fail", "another try would end alike", STUCK),
        (status(stall=STALL), history(5, replace(STUCK, step=6)), "restart", "made no progress", STUCK),
        (status(stall=STALL, stop_asked=True), history(1), "stopped", "at step 7, while stopping", STUCK),
        (
            status(stall=replace(STALL, culprits=(STOPPED,))),
            history(5, STOPPED),
            "restart",
            "step 7: its process is stopped",
            STOPPED,
        ),
        (status(stall=replace(STALL, culprits=(STUCK, STOPPED))), history(1), "restart", "(and 1 more)", STOPPED),
        (status(stall=replace(STALL, culprits=())), history(1), "restart", "all wait for each other in data, st", None),
        (
            status(stall=STALL, failures=(KILLED,)),
            history(1),
            "restart",
            "rank 2 on node 1 failed with SIGKILL",
            KILLED,
        ),
        (status(stall=STALL, lost_nodes=LOST), history(), "fail", "node 1 was lost: its agent died", None),
        # nodes
        (status(lost_nodes=LOST), history(), "fail", "node 1 was lost: its agent died", None),
        (status(lost_nodes=LOST, failures=(RAISED,)), history(), "fail", "node 1 was lost: its agent died", None),
        (status(lost_nodes=LOST, failures=(KILLED,)), history(), "fail", "node 1 was lost: its agent died", None),
        (
            status(lost_nodes=LOST, failures=(replace(KILLED, node=0),)),
            history(),
            "fail",
            "rank 2 on node 0 failed with SIGKILL",
            replace(KILLED, node=0),
        ),
        (status(lost_nodes={2: "x", 0: "x"}), history(), "fail", "nodes 0, 2 were lost: x", None),
        (status(lost_nodes={0: "x", 1: "y"}), history(), "fail", "node 0 was lost: x; node 1 was lost: y", None),
        (status(lost_nodes=LOST), history(3), "restart", "node 1 was lost: its agent died", None),
        (status(lost_nodes=LOST), history(1, None), "fail", "node 1 was lost: its agent died", None),
        (status(lost_nodes=LOST), replace(history(), replaces=True), "restart", "node 1 was lost", None),
        (status(lost_nodes=LOST), History(0, replaces=True, fruitless=1), "restart", "node 1 was lost", None),
        (status(lost_nodes=LOST), History(0, replaces=True, fruitless=2), "fail", "3 times without a new step", None),
        (status(lost_nodes=LOST, failures=(RAISED,)), History(0, replaces=True), "restart", "node 1 was lost", None),
        (
            status(lost_nodes=LOST, failures=(replace(KILLED, node=0),)),
            History(0, replaces=True),
            "fail",
            "rank 2 on node 0 failed with SIGKILL",
            replace(KILLED, node=0),
        ),
        # more nodes have come
        (status(regroup=True), history(), "wait", "", None),
        (status(ended=3, regroup=True), history(), "wait", "", None),
        (status(ended=4, regroup=True), history(), "regroup", "", None),
        (status(ended=4, regroup=True, complete=True), history(), "finish", "", None),
        (status(ended=4, regroup=True, stop_asked=True), history(), "stopped", "", None),
        (status(failures=(KILLED,), regroup=True), history(1), "restart", "SIGKILL", KILLED),
        (status(lost_nodes=LOST, stop_asked=True), history(3), "stopped", "died, while stopping", None),
        # the cluster
        (status(broken="Ray's raylet died"), history(3), "fail", "Ray's raylet died", None),
        (status(ended=4, lost_nodes=LOST, broken="Ray's raylet died"), history(), "finish", "", None),
        (status(broken="Ray's raylet died", stop_asked=True), history(3), "stopped", "Ray's raylet died", None),
    ],
)
def test_decisions(seen: Status, before: History, action: str, reason: str, culprit: RankFailure | None) -> None:
    decision = decide(seen, before)
    assert (decision.action, decision.culprit) == (action, culprit)
    assert reason in decision.reason
    assert bool(reason) == bool(decision.reason)


CRASHED = replace(KILLED, error="SIGSEGV", step=7)
AT_START = replace(CRASHED, step=-1)
LEFT = replace(KILLED, error="exit code 3", step=7)
USELESS = replace(RAISED, error="CorruptCheckpoint", step=-1)
CUT_OFF = replace(RAISED, rank=0, error="RuntimeError", what="Connection closed by peer", witness=True)
OTHERS = (KILLED, replace(RAISED, rank=3), None)


@pytest.mark.parametrize(
    ("seen", "before", "action", "reason", "culprit"),
    [
        # from outside: as often as it takes
        (status(failures=(KILLED,)), auto(), "restart", "rank 2 on node 1 failed with SIGKILL", KILLED),
        (status(failures=(KILLED, RAISED)), auto(), "restart", "rank 2 on node 1 failed with SIGKILL", KILLED),
        (status(failures=(KILLED,)), auto(*[KILLED] * 50), "restart", "SIGKILL", KILLED),
        (status(failures=(CRASHED,)), auto(), "restart", "SIGSEGV", CRASHED),
        (status(failures=(CRASHED,)), auto(replace(CRASHED, step=6)), "restart", "SIGSEGV", CRASHED),
        (status(failures=(CUT_OFF,)), auto(), "restart", "the connection of rank 0 on node 0 to another bro", CUT_OFF),
        (status(failures=(USELESS,)), auto(), "restart", "failed with CorruptCheckpoint", USELESS),
        (status(lost_nodes=LOST), auto(*OTHERS), "restart", "node 1 was lost: its agent died", None),
        (status(stall=replace(STALL, culprits=(STOPPED,))), auto(STOPPED), "restart", "is stopped", STOPPED),
        (status(ended=4, preempted=TOLD), auto(), "restart", "rank 1 was sent SIGTERM", None),
        (status(preempted=TOLD, failures=(GONE,)), auto(), "restart", "rank 1 was gone before", GONE),
        # while the run gets on
        (status(failures=(KILLED,)), auto(fruitless=1), "restart", "SIGKILL", KILLED),
        (status(failures=(KILLED,)), auto(fruitless=2), "fail", "that happened 3 times without a new step", KILLED),
        (status(failures=(KILLED,), fruitful=True), auto(fruitless=2), "restart", "SIGKILL", KILLED),
        (status(lost_nodes=LOST), auto(fruitless=2), "fail", "that happened 3 times without a new step", None),
        (status(ended=4, preempted=TOLD), auto(fruitless=2), "fail", "3 times without a new step", None),
        # a crash that comes again is no accident
        (status(failures=(CRASHED,)), auto(CRASHED, KILLED, fruitless=2), "fail", "would end alike", CRASHED),
        (status(failures=(AT_START,)), auto(AT_START, fruitless=1), "fail", "would end alike", AT_START),
        (status(failures=(AT_START,)), auto(AT_START, KILLED, fruitless=1), "restart", "SIGSEGV", AT_START),
        (status(failures=(AT_START,)), auto(AT_START), "restart", "SIGSEGV", AT_START),  # weeks ago
        # the program's doing: at once
        (status(failures=(RAISED,)), auto(), "fail", "rank 1 on node 0 failed with ValueError", RAISED),
        (status(failures=(replace(USELESS, step=7),)), auto(), "fail", "CorruptCheckpoint", ...),
        (status(failures=(CUT_OFF, RAISED)), auto(), "fail", "rank 1 on node 0 failed with ValueError", RAISED),
        (status(failures=(STARVED,)), auto(), "fail", "SIGKILL", STARVED),
        (status(failures=(replace(RAISED, starved=True),)), auto(), "fail", "ValueError", ...),
        (status(failures=(LEFT,)), auto(), "fail", "exit code 3", LEFT),
        (status(failures=(FINAL,)), auto(), "fail", "ValueError", FINAL),
        (status(failures=(replace(FINAL, witness=True),)), auto(), "fail", "ValueError", ...),
        (status(failures=(REFUSED,)), auto(), "refuse", "train longer", REFUSED),
        (status(stall=STALL), auto(), "fail", "made no progress for 12 s, in data at step 7", STUCK),
        (status(stall=replace(STALL, culprits=())), auto(), "fail", "all wait for each other", None),
        # the user's doing, and the cluster's
        (status(failures=(KILLED,), stop_asked=True), auto(), "stopped", "SIGKILL, while stopping", KILLED),
        (status(ended=4, preempted=TOLD, stop_asked=True), auto(), "stopped", "", None),
        (status(lost_nodes=LOST, broken="Ray's raylet died"), auto(), "fail", "Ray's raylet died", None),
    ],
)
def test_auto_goes_on_after_what_came_from_outside(
    seen: Status, before: History, action: str, reason: str, culprit: RankFailure | None
) -> None:
    decision = decide(seen, before)
    assert decision.action == action
    assert reason in decision.reason
    assert culprit in (..., decision.culprit)


def test_auto_counts_the_ends_between_which_there_was_no_new_step() -> None:
    killed = decide(status(failures=(KILLED,)), auto())
    once = auto().after(killed, lost=False, fruitful=False)
    assert (once.fruitless, once.culprits) == (1, (KILLED,))
    assert once.after(killed, lost=True, fruitful=False).fruitless == 2
    assert once.after(killed, lost=False, fruitful=True).fruitless == 1


def test_where_only_a_broken_connection_is_known_its_cause_is_waited_for() -> None:
    assert patience(KILLED) < patience(RAISED) == patience(None) < 3 < patience(CUT_OFF) < patience(CUT_OFF, told=True)
    assert patience(KILLED, told=True) == patience(KILLED)
    assert patience(replace(FINAL, witness=True)) == patience(RAISED)


def test_what_is_no_failure_is_bounded_all_the_same() -> None:
    told = decide(status(ended=4, preempted=TOLD), history(1))
    before = history(1).after(told, lost=False, fruitful=False)
    assert (before.fruitless, before.culprits) == (1, ())
    assert before.after(told, lost=False, fruitful=False).fruitless == 2
    assert before.after(told, lost=False, fruitful=True).fruitless == 1
    counted = decide(status(failures=(KILLED,)), history(1))
    assert before.after(counted, lost=False, fruitful=False) == History(1, (KILLED,))


def test_deciding_changes_nothing() -> None:
    seen = status(failures=(RAISED, KILLED), lost_nodes=dict(LOST))
    assert decide(seen, history(1)) == decide(seen, history(1))
    assert seen == status(failures=(RAISED, KILLED), lost_nodes=LOST)
    assert isinstance(decide(seen, history(1)), Decision)
