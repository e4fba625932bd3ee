"""Between two generations: which nodes train next."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from ..core.recovery import RecoverySpec
from .generation import Generation
from .interrupt import StopRequests
from .policy import Decision
from .roster import Roster
from .staffing import staff
from .view import View

_TURN = 0.05
_PATIENCE = 3.0  # seconds that are waited without a word


class Succession:
    """Carries out what :func:`~.staffing.staff` decides, on a roster.

    Args:
        meanwhile: called while another node is waited for.
    """

    def __init__(
        self, roster: Roster, recovery: RecoverySpec, *, view: View, stop: StopRequests, meanwhile: Callable[[], None]
    ) -> None:
        self._roster, self._recovery = roster, recovery
        self._view, self._stop, self._meanwhile = view, stop, meanwhile

    def settle(self, generation: Generation, decision: Decision) -> tuple[Decision, str]:
        """Settle who trains after ``generation``; the decision, another one where nobody can, and what has changed."""
        lost = dict(generation.lost)
        culprit = decision.culprit if decision.counts else None
        to_blame = culprit is not None and not culprit.witness and culprit.node not in lost
        if culprit is not None and to_blame and self._roster.blame(culprit.node):
            lost[culprit.node] = "it has failed again and again"
        if lost:
            self._roster.lose(lost)
        count = self._roster.better() if decision.action == "regroup" else self._wait(sorted(lost))
        if count:
            return decision, self._roster.settle(count)
        if self._stop.count:
            return replace(decision, action="stopped", reason=f"{decision.reason}, while stopping"), ""
        why = f"no other node came within {self._recovery.node_wait:g} s"
        return replace(decision, action="fail", reason=f"{decision.reason}; {why}"), ""

    def _wait(self, lost: list[int]) -> int:
        """Find nodes in the place of lost ones, waiting for them if need be; how many train next, 0 if they cannot."""
        began, told = time.monotonic(), not lost
        while True:
            self._roster.tick()
            waited = time.monotonic() - began
            staffing = staff(self._roster.crew(waited))
            if staffing.move == "go":
                return staffing.nodes
            if staffing.move == "give_up" or self._stop.count:
                return 0
            if waited > _PATIENCE and not told:
                told = True
                which = ("node " if len(lost) == 1 else "nodes ") + ", ".join(map(str, lost))
                limit = f"at most {self._recovery.node_wait:g} s"
                self._view.note(f"{which} lost: waiting for another machine to take the place ({limit})")
            self._meanwhile()
            time.sleep(_TURN)
