"""What a job says of failures: ``recovery``."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from .spec import Duration, Spec, parse_duration


class RecoverySpec(Spec):
    max_restarts: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """How often the ranks are started again after a failure (from the newest snapshot). 'auto': after what came from
    outside (a killed or stopped rank, a lost node, a notice to end) as often as it takes, while the run gets on; after
    what the program did, never. For scripts 'auto' is 0: only they know whether they can go on."""
    snapshot: Annotated[int, Field(ge=1)] | Literal["auto", "never"] = "auto"
    """Steps from one snapshot in the memory of the ranks' nodes to the next: ranks that are started again go on from
    there. 'auto' takes them as often as that costs a hundredth of the step time; with 'never' the newest checkpoint is
    all there is. Scripts have none."""
    copies: bool = True
    """Each node's snapshots are copied to another node too, one after the other, in the background, so that a lost node
    is no reason to go back to the newest checkpoint. Only where a run on several nodes may be started again; with
    max_restarts 'auto', and neither spares nor a range of nodes, only where these are several machines."""
    start_timeout: Duration = 120.0
    """Longest wait for the cluster, the node agents and the fork servers, each."""
    stop_grace: Duration = 30.0
    """Time that ranks get to end after the first Ctrl-C or SIGTERM before they are killed."""
    stall: Duration | Literal["auto", "never"] = "auto"
    """How long a rank may stay in one place of a step before that counts as a failure. 'auto' is ten times the slowest
    step, and two minutes at least, or ten seconds for a process that was stopped (SIGSTOP); 'never' lets ranks hang.
    Scripts are not watched: they do not say where they are."""
    stall_at_start: Duration = 1800.0
    """The same before the third step of a start, and in its first evaluation and checkpoint, which may compile, load
    and allocate. Collectives wait for half an hour at most by themselves."""

    spares: int = Field(default=0, ge=0)
    """Nodes that are placed beside those that train and wait, ready to start ranks, to take the place of lost ones."""
    nodes: str | None = None
    """As 'least:most': how many nodes the run may go on with when some are lost and nothing takes their place. It grows
    again when nodes come. With train.microbatches 'auto' there are as many as for the most nodes, at every size, so
    that the numbers stay the same."""
    node_wait: Duration = 60.0
    """Longest wait for another node in the place of a lost one, where there is no spare."""

    @field_validator("nodes", mode="before")
    @classmethod
    def _parse_nodes(cls, nodes: object) -> object:
        if nodes is None:
            return None
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", nodes) if isinstance(nodes, str) else None
        if match is None:
            raise ValueError(f"{nodes!r} is no range of nodes: write the least and the most, like '4:8' (with quotes)")
        least, most = int(match[1]), int(match[2])
        if not 1 <= least <= most:
            raise ValueError(f"the range {nodes!r} has no nodes in it: the least comes first, and is 1 at least")
        return f"{least}:{most}"

    @property
    def node_range(self) -> tuple[int, int] | None:
        """Least and most nodes of :attr:`nodes`; None where their number is fixed."""
        if self.nodes is None:
            return None
        least, _, most = self.nodes.partition(":")
        return int(least), int(most)

    @property
    def replaces(self) -> bool:
        """Whether the run is made for losing nodes, so that it does not count as a failure."""
        return self.spares > 0 or self.nodes is not None

    def copies_among(self, nodes: int, *, machines: int) -> bool:
        """Whether snapshots are copied to another of ``nodes`` nodes, which lie on so many machines.

        Nodes of one machine are not lost to anything but tests and ``kill``: nobody pays for copies there unasked.
        """
        goes_on = self.replaces or (machines > 1 if self.max_restarts == "auto" else self.max_restarts > 0)
        return self.copies and goes_on and nodes > 1 and self.snapshot != "never"

    def for_script(self) -> RecoverySpec:
        """The same for a program that may have nothing to go on from: it is not started again unasked."""
        return self.model_copy(update={"max_restarts": 0}) if self.max_restarts == "auto" else self

    @field_validator("stall", mode="before")
    @classmethod
    def _parse_stall(cls, stall: object) -> object:
        if stall in ("auto", "never"):
            return stall
        try:
            seconds = parse_duration(stall)
        except ValueError as error:
            raise ValueError(f"{error}; or 'auto' or 'never'") from None
        if seconds < 1:
            raise ValueError("ranks are looked at about twice a second: give at least 1 s, or 'never'")
        return seconds
