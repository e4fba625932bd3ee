"""A rank's part of snapshots, copied into memory: which pieces, where, and when they count."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..checkpoint.writer import assign
from ..core.contracts import ShardedState
from ..core.job import Job
from .context import Context
from .hold import Given, Hold
from .marks import Marks
from .staging import Holdings, ImagePlan, Stage
from .together import gathered


@dataclass(frozen=True)
class Position:
    """Where in the job a snapshot was taken: completed steps, samples consumed, and small facts to carry over."""

    step: int
    samples: int
    total_steps: int
    extra: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        return {"samples": self.samples, "total_steps": self.total_steps, "extra": self.extra}


class Memory:
    """Where this rank's snapshots lie.

    What a node's ranks hold is copied once by one of them, so that they all can go on from their own node's memory. A
    checkpoint holds every piece once: it takes a part of these.

    There are two stages for snapshots that stay in memory: the newest, and the one that is written next. A stage that a
    persister reads, or that is kept for copies on other nodes, is not written to; more are made then.

    Attributes:
        marks: which snapshots are kept for copies on other nodes.
        plan: what is copied; None before :meth:`assign`.
        outdated: this rank has other pieces than the plan was made for.

    Args:
        hold: who keeps the images when this rank is gone; None where nobody does: then they hold the checkpoint's
            pieces only.
        generation: number of this start of the ranks.
        copies: other nodes are to have copies.
    """

    def __init__(self, job: Job, ctx: Context, *, hold: Hold | None, generation: int = 0, copies: bool = False) -> None:
        self._job, self._ctx = job, ctx
        self._hold = hold
        self._generation = generation
        self._holdings = Holdings()
        self._stages: list[Stage] = []
        self._newest: Stage | None = None
        self.marks = Marks(wanted=copies and hold is not None)
        self.plan: ImagePlan | None = None
        self.outdated = True

    @property
    def held(self) -> bool:
        """Whether snapshots outlive this rank."""
        return self._hold is not None

    def adopt(self, given: list[Given]) -> None:
        """Take over what an earlier rank of this number has left. The snapshot that was gone on from stays for now."""
        for item in given:
            stage = Stage.adopted(item.fd) if item.mine else None
            if stage is None:
                continue
            self._stages.append(stage)
            if item.restores:
                self._newest = stage
                self.marks.adopt(stage)

    def look(self, state: ShardedState) -> None:
        """Take in an engine's state: :meth:`copy` copies what it holds."""
        self.outdated = self._holdings.refresh(state) or self.outdated

    def assign(self, state: ShardedState, tracking: dict[str, Any]) -> None:
        """Settle who copies, and who writes, what. Collective.

        It is the same until tensors come or go, as the optimizer's do in the first step.
        """
        everyone = gathered((self._holdings.keys(), secrets.token_hex(4)), self._ctx.world_size)
        held = [keys for keys, _ in everyone]
        if self._hold is not None:
            size = self._ctx.local_world_size  # ranks are numbered node by node
            nodes = [held[first : first + size] for first in range(0, len(held), size)]
            held = [keys for node in nodes for keys in assign(node)]
        facts = {"job": self._job.model_dump(mode="json"), "rng": {"seed": self._job.seed}, "tracking": tracking}
        rank = self._ctx.rank
        durable = assign(held)[rank]
        mine = held[rank] if self._hold is not None else durable
        self.plan = ImagePlan(state, durable, mine, save=everyone[0][1], facts=facts)
        self.outdated = False

    def copy(self, position: Position, *, row: int, rows: bytes, lent: Collection[Stage]) -> Stage:
        """Copy the pieces that were last looked at, by the plan.

        Args:
            row: step of the newest row of metrics before the position.
            rows: the newest rows, as JSON: of as many as may not have reached the controller.
            lent: stages that must not be written to.
        """
        plan = self.plan
        assert plan is not None, "assign() comes first"
        if self._hold is not None:
            self._hold.flush()
        stage = self._free(plan.size, lent)
        stage.fill(plan, self._holdings)
        text = b"\n".join([plan.text, json.dumps(position.facts(), separators=(",", ":")).encode(), rows])
        ctx = self._ctx
        place = {"generation": self._generation, "step": position.step, "rank": ctx.rank, "world": ctx.world_size}
        stage.commit(plan, text, **place, row=row, marked=int(self.marks.due))
        self._newest = stage
        self.marks.taken(stage)
        return stage

    def _free(self, size: int, lent: Collection[Stage]) -> Stage:
        """A stage of at least ``size`` bytes that holds nothing which is needed."""
        kept = {self._newest, *self.marks.stages} if self._hold is not None else set[Stage | None]()
        free = [stage for stage in self._stages if stage not in kept and stage not in lent]
        for stage in free:
            if stage.capacity >= size:
                return stage
        for stage in free:  # none is large enough any more
            self._stages.remove(stage)
            if self._hold is not None:
                self._hold.drop(stage.fd)
            stage.close()
        stage = Stage.of_size(size)
        self._stages.append(stage)
        if self._hold is not None:
            self._hold.keep(stage.fd)
        return stage
