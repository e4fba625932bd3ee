"""Snapshots from the rank's side: copied into memory together, and now and then made durable."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.saving import Snapshot, description
from ..core.contracts import Engine
from ..core.errors import DltrainError
from .marks import Progress
from .memory import Memory, Position
from .persistence import Persister, PersisterLost
from .reporter import Reporter
from .staging import Stage
from .together import any_of, gathered

_PATIENCE = 5.0  # seconds that the last checkpoint is waited for without a word
_HOPELESS = 60.0  # seconds that a failing storage is tried when training is over
_ANSWER = 10.0  # seconds that a persister has to let go of what it has not begun to write
_GIVEN = 2  # snapshots that a persister has: the one that it writes, and the next
_STARTS = 5  # persisters that are tried for one snapshot


class SaveFailed(DltrainError):
    """A checkpoint could not be written; the older ones are untouched."""


@dataclass
class _Staged:
    """A snapshot that the persister was given: its image lies in a stage."""

    step: int
    stage: Stage
    text: bytes
    starts: int = 0
    """How often a persister was started for it."""
    dropped: bool = False
    """The persister was told to give it up, as every rank's is."""


class Snapshots:
    """Takes snapshots of an engine's state, and has the persister make some of them durable.

    The persister has two at most: the one that is being written, and the newest, which takes the place of an older one
    that waits. All ranks decide that alike, so that a checkpoint is of one step.

    Attributes:
        newest: step of the snapshot that was given to the persister, or of the checkpoint in this run's folder that was
            restored, last; -1 before.
    """

    def __init__(self, persister: Persister, memory: Memory, *, rank: int, world: int, reporter: Reporter) -> None:
        self._persister = persister
        self._memory = memory
        self._rank, self._world = rank, world
        self._reporter = reporter
        self.newest = -1
        self._given: list[_Staged] = []
        self._skipped = 0
        self._trouble = ""
        self._failure = ""
        self._figures: dict[str, float] = {}

    def save(self, engine: Engine, position: Position, tracking: dict[str, Any]) -> None:
        """Copy this rank's part into memory; it is made durable in the background. Collective."""
        taken, begin = time.time(), time.perf_counter()
        self._reporter.sync()
        memory = self._memory
        state = engine.state()
        memory.look(state)
        self.poll()
        flags = memory.outdated, len(self._given) > 1, bool(self._trouble)
        outdated, full, trouble = any_of(*flags, world=self._world)
        if outdated:
            memory.assign(state, tracking)
        if full or trouble:
            self._give_way(position.step, all_of_them=trouble)
        self._wait_for_room()
        row = self._reporter.unsettled()
        stage = self._copy(position)
        text = self._description(position, row, taken, time.perf_counter() - begin)
        self.newest, self._failure, self._trouble = position.step, "", ""
        self._given.append(_Staged(position.step, stage, text))
        self._hand_over(self._given[-1])

    def figures(self) -> dict[str, float]:
        """As metrics, on rank 0: what the newest checkpoint that was completed since the last call has cost, and how
        many snapshots were given up so far, where there were more since.
        """
        figures, self._figures = self._figures, {}
        return figures

    def remember(self, engine: Engine, position: Position, tracking: dict[str, Any]) -> bool:
        """Copy this rank's part into memory, to go on from when a rank is lost; whether it counts.

        No rank waits for another. Where one cannot copy, the others' parts of this step are of no use; what is needed
        then is settled when the ranks agree on something the next time.
        """
        memory = self._memory
        state = engine.state()
        memory.look(state)
        if memory.plan is None:  # on every rank alike
            memory.assign(state, tracking)
        if memory.outdated or not self._reporter.delivered():
            memory.marks.miss()
            return False
        self._copy(position)
        return True

    @property
    def outdated(self) -> bool:
        """Whether this rank holds other pieces than have been assigned."""
        return self._memory.plan is not None and self._memory.outdated

    @property
    def copies(self) -> Progress:
        """How far this rank's node is with the copy of a snapshot on another one."""
        return self._memory.marks.progress

    def agree_copies(self, progress: Progress) -> None:
        """Take in how far all nodes are. At the same step on every rank."""
        self._memory.marks.agree(progress)

    def reassign(self) -> None:
        """Have all ranks settle anew who copies what, at the next snapshot. At the same step on every rank."""
        self._memory.plan = None

    def _copy(self, position: Position) -> Stage:
        lent = {staged.stage for staged in self._given}
        row, rows = self._reporter.recent() if self._memory.held else (0, b"[]")
        return self._memory.copy(position, row=row, rows=rows, lent=lent)

    def _description(self, position: Position, row: int, taken: float, stall: float) -> bytes:
        """What the persister is told of the snapshot that was copied last."""
        plan = self._memory.plan
        assert plan is not None
        facts = plan.facts | position.facts() if self._rank == 0 else None
        image = memoryview(b"")  # it goes as a descriptor
        return description(
            Snapshot(position.step, plan.save, self._rank, self._world, plan.durable, image, facts, row, taken, stall)
        )

    def poll(self) -> None:
        """Take in what the persister says. Costs microseconds."""
        try:
            for message in self._persister.receive():
                self._take(message)
        except PersisterLost:
            if self._given:  # else there is nothing to start another for
                self._start_again()

    def finish(self, timeout: float, *, alive: Callable[[], None] = lambda: None) -> None:
        """Wait until the newest snapshot is durable. Collective.

        Args:
            alive: called about every second, so that nobody takes the wait for a stall.

        Raises:
            SaveFailed: it is not, after ``timeout`` seconds, or while the storage fails; or it could not be written (on
                every rank alike).
        """
        begin, told, since = time.monotonic(), self._rank != 0, 0.0
        while True:
            alive()
            waited = time.monotonic() - begin
            since = 0.0 if not self._trouble else since or waited
            hopeless = waited > timeout or (since > 0 and waited - since > _HOPELESS)
            pending, hopeless = any_of(bool(self._given), hopeless, world=self._world)
            if not pending or hopeless:
                break
            if waited > _PATIENCE and not told:
                told = True
                text = f"waiting for the checkpoint of step {self.newest} to be written (at most {timeout:g} s)"
                self._reporter.send("note", text=text)
            if self._given:
                self._persister.wait(1.0)
                self.poll()
        if self._given:
            self._drop(self._given)
            self._failure = self._trouble or f"not done after {time.monotonic() - begin:.0f} s"
        failures = [f"rank {rank}: {why}" for rank, why in enumerate(gathered(self._failure, self._world)) if why]
        if failures:
            raise SaveFailed(f"checkpoint of step {self.newest} not written: " + "; ".join(failures))

    def _take(self, message: dict[str, Any]) -> None:
        match message["t"]:
            case "say":
                said = dict(message["message"])
                self._reporter.send(said.pop("t"), **said)
            case "trouble":
                self._trouble = message["why"]
            case "ended":
                self._end(message["step"], message["why"])
                self._figures |= {f"checkpoint/{name}": value for name, value in message["cost"].items()}
            case other:
                raise ValueError(f"the persister sent a message of kind {other!r}")

    def _give_way(self, step: int, *, all_of_them: bool) -> None:
        """Give up the newest snapshot, which waits on some rank, or all that are given. No rank may write it then."""
        self._skipped += 1
        if self._rank == 0:
            self._figures["checkpoint/skipped"] = self._skipped
        if self._rank == 0 and not all_of_them and self._skipped.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, ...
            what = f"checkpoint of step {self.newest} was skipped for that of step {step}"
            why = "the storage is slower than 'checkpoint.every'"
            self._reporter.send("note", text=f"{what}, since {why} ({self._skipped} skipped so far)")
        self._drop([staged for staged in self._given if all_of_them or staged.step == self.newest])

    def _drop(self, given: Sequence[_Staged]) -> None:
        for staged in given:
            staged.dropped = True
            with contextlib.suppress(PersisterLost):  # as poll() will find
                self._persister.drop(staged.step)

    def _wait_for_room(self) -> None:
        """Have the persister able to take another snapshot.

        It answers at once that it lets go of what it has not begun to write.
        """
        deadline = time.monotonic() + _ANSWER
        while len(self._given) == _GIVEN:
            if time.monotonic() > deadline:
                self._start_again()
            self._persister.wait(1.0)
            self.poll()

    def _hand_over(self, staged: _Staged) -> None:
        with contextlib.suppress(PersisterLost):  # as the next poll() will find
            self._persister.save(staged.step, staged.stage.fd, staged.text)

    def _start_again(self) -> None:
        """Start another persister, and give it what the lost one had: its memory is still here."""
        what = f"rank {self._rank}: the process that writes checkpoints was lost; started again"
        self._reporter.send("note", text=what)
        self._persister.restart()
        for staged in list(self._given):
            staged.starts += 1
            if staged.starts <= _STARTS and not staged.dropped:
                self._hand_over(staged)
            else:
                self._end(staged.step, f"the process that writes checkpoints was lost {staged.starts} times")

    def _end(self, step: int, why: str) -> None:
        """Note that the persister is done with a snapshot, or with trying; ``why`` it did not succeed."""
        for staged in [staged for staged in self._given if staged.step == step]:
            self._given.remove(staged)
            if why and not staged.dropped:  # other ranks' parts of it are of no use: they hear of that at the next save
                self._trouble = why
            if step == self.newest:
                self._failure = why
            if not why:
                self._trouble = ""
