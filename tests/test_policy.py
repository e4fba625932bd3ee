"""What to do when something ends: the table of cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dltrain.launcher.policy import Decision, History, RankFailure, Stall, Status, decide

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
        (status(ended=4, preempted=TOLD), History(1, fruitless=2), "restart", "rank 1 was sent SIGTERM", None),
        (status(ended=4, preempted=TOLD), History(1, fruitless=3), "fail", "3 times without a step", None),
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
        (status(lost_nodes=LOST), History(0, replaces=True, fruitless=2), "restart", "node 1 was lost", None),
        (status(lost_nodes=LOST), History(0, replaces=True, fruitless=3), "fail", "3 times without a step", None),
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


def test_what_is_no_failure_is_bounded_all_the_same() -> None:
    told = decide(status(ended=4, preempted=TOLD), history(1))
    before = history(1).after(told, lost=False, fruitful=False)
    assert (before.fruitless, before.culprits) == (1, ())
    assert before.after(told, lost=False, fruitful=True).fruitless == 0
    counted = decide(status(failures=(KILLED,)), history(1))
    assert before.after(counted, lost=False, fruitful=False) == History(1, (KILLED,))


def test_deciding_changes_nothing() -> None:
    seen = status(failures=(RAISED, KILLED), lost_nodes=dict(LOST))
    assert decide(seen, history(1)) == decide(seen, history(1))
    assert seen == status(failures=(RAISED, KILLED), lost_nodes=LOST)
    assert isinstance(decide(seen, history(1)), Decision)
