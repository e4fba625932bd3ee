"""The nodes of a run as they come and go: who trains, who waits, who is on the way, and which machines are avoided."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.errors import DltrainError
from ..core.processes import Process, name_of
from . import untyped
from .cluster import Cluster, Seat, loss_of
from .enlist import Enlisting
from .heartbeats import Heartbeats
from .messages import NodeInfo
from .session import Session
from .staffing import LOSSES, SILENCE, Crew, excluded, grown, silent_nodes

_LOOK = 1.0  # seconds between looks for resources that have become free
_SUSPECT = 30.0  # seconds for which a machine that went silent, or failed to make an agent, gets no other


@dataclass(frozen=True)
class Member:
    """A node that is ready to start ranks; ``process`` is its agent's, where that is on this machine."""

    agent: Any
    info: NodeInfo
    process: Process | None = None

    @property
    def machine(self) -> str:
        """Ray's name of its machine."""
        return self.info.ray_node

    def __str__(self) -> str:
        return self.info.hostname


@dataclass
class _Recruit:
    """A node on its way: its agent was asked for, and gets ready."""

    machine: str
    enlisting: Enlisting
    since: float = field(default_factory=time.monotonic)


class Roster:
    """Keeps ``cluster.agents`` and ``cluster.nodes`` to those that train, in order of their numbers.

    Args:
        session: its cluster has all nodes, the spare ones last.
        enlist: begins to prepare an agent that was just made.
        say: tells the user.

    Attributes:
        sizes: the numbers of nodes that the run may have.
        heartbeats: of every node, spare ones too.
    """

    def __init__(self, session: Session, *, enlist: Callable[[Any], Enlisting], say: Callable[[str], None]) -> None:
        self._cluster: Cluster = session.cluster
        self._embedded, self._spread = session.embedded, session.demand.spread
        self._timeout, self._patience = session.recovery.start_timeout, session.recovery.node_wait
        self._enlist, self._say = enlist, say
        self._here: str = untyped.ray().get_runtime_context().get_node_id()
        self.sizes = session.sizes(session.demand.ranks)
        pairs = zip(self._cluster.agents, self._cluster.nodes, strict=True)
        members = [self._member(agent, info) for agent, info in pairs]
        count = session.demand.nodes
        self._nodes: list[Member | None] = [*members[:count]]
        self._spares = members[count:]
        self._count, self._reserve = count, len(members) - count
        self._recruits: list[_Recruit] = []
        self._asked: list[Seat] = []
        self._suspects: dict[str, float] = {}
        self._blamed: list[str] = []
        self._newly_excluded: list[str] = []
        self._looked, self._coming = -_LOOK, True
        self.heartbeats = Heartbeats(loss_of)
        self._publish()

    def __enter__(self) -> Roster:
        self.heartbeats.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.heartbeats.stop()
        for recruit in self._recruits:
            recruit.enlisting.close()

    # ---- what is lost

    def silent(self, still: Mapping[int, float]) -> dict[int, str]:
        """Nodes that are dead or do not answer, and why. ``still``: see :func:`~.staffing.silent_nodes`."""
        members = {node: member for node, member in enumerate(self._nodes) if member is not None}
        found = {node: gone for node, member in members.items() if (gone := self.heartbeats.gone(member.agent))}
        silence = {node: self.heartbeats.silence(member.agent) for node, member in members.items()}
        if max(silence.values(), default=0.0) <= SILENCE:
            return found
        here = {node for node, member in members.items() if member.process is not None}
        held = {node for node in here if (process := members[node].process) and process.state == "T"}
        return silent_nodes(silence, still, here=here, stopped=held) | found

    def lose(self, lost: Mapping[int, str]) -> None:
        """Let go of nodes: whatever still runs on them is ended, as far as they can be reached."""
        for node in lost:
            member, self._nodes[node] = self._nodes[node], None
            if member is not None:
                silent = not self.heartbeats.gone(member.agent)
                self._let_go(member, suspect=silent and member.process is None)
                self._blame(member)
        self._looked, self._coming = -_LOOK, True
        self._publish()

    def blame(self, node: int) -> bool:
        """A rank of this node was the first to fail. Whether it is to be replaced for that, and there is a spare."""
        member = self._nodes[node]
        if member is None:
            return False
        self._blame(member)
        excluded = self._excluded()
        return member.machine in excluded and any(spare.machine not in excluded for spare in self._spares)

    def crew(self, waited: float) -> Crew:
        """What there is to go on with, ``waited`` seconds after a loss."""
        left = sum(member is not None for member in self._nodes)
        coming = bool(self._recruits) or self._coming
        return Crew(len(self._nodes), left + len(self._spares), coming, waited, self._patience, self.sizes)

    def better(self) -> int:
        """The number of nodes that the run could have now, if that is more than it has; else what it has."""
        now, there = len(self._nodes), len(self._nodes) + len(self._spares)
        again = grown(now, min(there, self._count), self.sizes)
        return grown(again, there - self._reserve, self.sizes)  # beyond what it began with, the spares stay spares

    # ---- who takes their place

    def settle(self, count: int) -> str:
        """Have ``count`` nodes train: spares take the places of lost nodes, or add to them; what was done, in words."""
        done: list[str] = []
        for node, member in enumerate(self._nodes):
            if member is None and self._spares:
                self._nodes[node] = self._spares.pop(0)
                done.append(f"another ({self._nodes[node]}) took the place of node {node}")
        used = {str(member) for member in self._nodes if member is not None}
        done += [
            f"{host} is not used any more after {LOSSES} failures" for host in self._newly_excluded if host not in used
        ]
        self._newly_excluded.clear()
        members = [member for member in self._nodes if member is not None]
        before = len(self._nodes)
        while len(members) < count:
            members.append(self._spares.pop(0))
        self._spares = [*members[count:], *self._spares]
        self._nodes = [*members[:count]]
        if count != before:
            done.append(f"the run goes on with {count} node{'s' if count > 1 else ''} instead of {before}")
        self._publish()
        return "; ".join(done)

    def tick(self) -> None:
        """Look after the nodes that wait and those on their way, and ask for more while there are too few."""
        self._drop_dead_spares()
        for recruit in list(self._recruits):
            self._look_at(recruit)
        there = sum(member is not None for member in self._nodes) + len(self._spares)
        missing = self._wanted() - there - len(self._recruits)
        if missing <= 0:
            while self._asked and not self._recruits:
                self._cluster.give_up(self._asked.pop())
        elif time.monotonic() - self._looked >= _LOOK:
            self._looked = time.monotonic()
            self._recruit(missing)

    def _recruit(self, missing: int) -> None:
        seats = self._usable_seats()
        self._coming = bool(seats) or (not self._embedded and self._cluster.has_room(self._avoided()))
        for seat, machine in seats[:missing]:
            if seat in self._asked:
                self._asked.remove(seat)
            agent = self._cluster.hire(seat)
            try:
                self._recruits.append(_Recruit(machine, self._enlist(agent)))
            except DltrainError as error:
                self._turn_away(agent, machine, str(error))
        if not self._embedded:
            while len(self._asked) < missing - len(seats):
                self._asked.append(self._cluster.ask_for_seat(self._avoided()))

    def _look_at(self, recruit: _Recruit) -> None:
        try:
            info = recruit.enlisting.ready()
            late = time.monotonic() - recruit.since > self._timeout
            why = f"it was not ready within {self._timeout:g} s" if info is None and late else ""
        except DltrainError as error:
            info, why = None, str(error)
        if info is not None:
            self._spares.append(self._member(recruit.enlisting.agent, info))
        if why:
            self._turn_away(recruit.enlisting.agent, recruit.machine, why)
        if info is not None or why:
            recruit.enlisting.close()
            self._recruits.remove(recruit)
            self._publish()

    def _turn_away(self, agent: Any, machine: str, why: str) -> None:
        self._say(f"a node could not join: {why}")
        self._suspects[machine] = time.monotonic() + _SUSPECT
        self._cluster.dismiss(agent)

    def _drop_dead_spares(self) -> None:
        for member in list(self._spares):
            gone = self.heartbeats.gone(member.agent)
            limit = SILENCE if member.process is None else 10 * SILENCE
            if gone or self.heartbeats.silence(member.agent) > limit:
                self._spares.remove(member)
                self._let_go(member, suspect=not gone and member.process is None)
                self._blame(member)
                self._say(f"a spare node ({member}) was lost: {gone or 'its agent does not answer'}")
                self._publish()

    # ---- machines

    def _usable_seats(self) -> list[tuple[Seat, str]]:
        avoided = self._avoided()
        found: list[tuple[Seat, str]] = []
        for seat, machine in self._cluster.free_seats():
            if machine not in avoided:
                found.append((seat, machine))
                avoided |= {machine} if self._spread else set()
            elif seat in self._asked:  # it was asked for before this machine was to be avoided
                self._asked.remove(seat)
                self._cluster.give_up(seat)
        return found

    def _avoided(self) -> set[str]:
        now = time.monotonic()
        avoided = {machine for machine, until in self._suspects.items() if until > now}
        if self._spread:
            members = [member for member in (*self._nodes, *self._spares) if member is not None]
            avoided |= {member.machine for member in members} | {recruit.machine for recruit in self._recruits}
        excluded = self._excluded()
        there_is_another = bool(excluded) and self._cluster.has_room(avoided | excluded)
        return avoided | excluded if there_is_another else avoided

    def _blame(self, member: Member) -> None:
        before = self._excluded()
        self._blamed.append(member.machine)
        if self._excluded() - before:
            self._newly_excluded.append(str(member))

    def _excluded(self) -> set[str]:
        return set() if self._embedded else set(excluded(self._blamed))

    def _wanted(self) -> int:
        """Nodes, spare ones too, that the run may have: an embedded cluster was made for those that it began with."""
        most = self._count if self._embedded else max(self._count, *self.sizes)
        return most + self._reserve

    # ---- keeping book

    def _member(self, agent: Any, info: NodeInfo) -> Member:
        process = Process.of(info.pid) if info.ray_node == self._here else None
        if not name_of(info.pid).startswith("ray::"):
            process = None  # its numbers are of another namespace
        return Member(agent, info, process)

    def _let_go(self, member: Member, *, suspect: bool) -> None:
        self._cluster.dismiss(member.agent)
        if member.process is not None:
            member.process.signal(signal.SIGKILL)  # one that is stopped takes Ray seconds
        if suspect:
            self._suspects[member.machine] = time.monotonic() + _SUSPECT

    def _publish(self) -> None:
        """Tell who trains, and whose heartbeats count."""
        present = [member for member in self._nodes if member is not None]
        self.heartbeats.watch(member.agent for member in (*present, *self._spares))
        if len(present) == len(self._nodes):
            self._cluster.agents = [member.agent for member in present]
            self._cluster.nodes = [replace(member.info, node=node) for node, member in enumerate(present)]
