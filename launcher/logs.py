"""The output that a run's ranks left, of all generations, read to the end or followed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import JobError, Problem
from .rundir import Record
from .runs import standing

_CHUNK = 1 << 20
_POLL = 0.2
_QUIET = 3  # looks without news after the end: ranks of a killed driver are killed a moment later


@dataclass(frozen=True)
class Source:
    """A rank of one generation; the node is -1 where it is not known."""

    generation: int
    rank: int
    node: int


@dataclass(frozen=True)
class Pick:
    """Whose output; None is everybody's."""

    ranks: Collection[int] | None = None
    nodes: Collection[int] | None = None
    generations: Collection[int] | None = None

    def takes(self, source: Source) -> bool:
        """Whether it takes this rank's output."""
        return (
            (self.generations is None or source.generation in self.generations)
            and (self.ranks is None or source.rank in self.ranks)
            and (self.nodes is None or source.node in self.nodes)
        )

    def missing(self, there: Collection[Source]) -> list[Problem]:
        """What it asks for and none of those that are there is."""
        if not there:
            return []
        problems: list[Problem] = []
        for name, wanted, known in (
            ("rank", self.ranks, {source.rank for source in there}),
            ("node", self.nodes, {source.node for source in there if source.node >= 0}),
            ("generation", self.generations, {source.generation for source in there}),
        ):
            absent = sorted({*(wanted or ())} - known)
            if absent:
                what = f"the run has no logs of {name} {_spans(absent)}"
                problems.append(Problem(what, f"--{name}", f"there are those of {name} {_spans(sorted(known)) or '?'}"))
        if not problems and not any(map(self.takes, there)):
            problems.append(Problem("the run has logs of each that was asked for, and none of all at once"))
        return problems


@dataclass
class _File:
    path: Path
    prefix: bytes
    offset: int = 0
    begun: bytes = b""

    def lines(self) -> Iterator[bytes]:
        """The whole lines that have come since the last call, each after the prefix."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self.offset)
            while chunk := file.read(_CHUNK):
                self.offset += len(chunk)
                *whole, self.begun = (self.begun + chunk).split(b"\n")
                yield from (self.prefix + line + b"\n" for line in whole)

    def rest(self) -> Iterator[bytes]:
        """What came without an end of line."""
        if self.begun:
            yield self.prefix + self.begun + b"\n"
            self.begun = b""


@dataclass
class Logs:
    """Every line that the picked ranks of a run have printed: each once, with generation and rank before it.

    A generation's come before the next one's. Within one they are sorted by rank, or, followed, come as they come.
    """

    run: Path
    pick: Pick = field(default_factory=Pick)
    _files: dict[tuple[int, int, str], _File] = field(default_factory=dict[tuple[int, int, str], _File])

    def missing(self) -> list[Problem]:
        """What was asked for of which nothing is there; a run that has no logs yet may come to have them all."""
        return self.pick.missing([source for source, _ in self._sources()])

    def check(self) -> None:
        """Refuse to look for what is not there; raises JobError with what is."""
        if problems := self.missing():
            raise JobError(*problems)

    def read(self) -> Iterator[bytes]:
        """The lines that are there, also one that has not ended yet.

        Raises:
            JobError: there is nothing of what is asked for.
        """
        self.check()
        yield from self._whole()
        yield from self._unfinished()

    def follow(self) -> Iterator[bytes]:
        """The lines that are there and all that come, until the run has ended.

        Raises:
            JobError: it has ended, and there is nothing of what is asked for.
        """
        quiet = 0
        while quiet < _QUIET:
            over = self.over()  # asked first: what was printed before the end is read after it
            before = self._read_so_far()
            yield from self._whole()
            idle = self._read_so_far() == before
            quiet = quiet + 1 if over and idle else 0
            if idle:
                time.sleep(_POLL)
        yield from self._unfinished()
        self.check()

    def over(self) -> bool:
        """Whether the run has ended."""
        record = Record.read(self.run)
        return record is not None and standing(record) != "running"

    def _read_so_far(self) -> int:
        return sum(file.offset for file in self._files.values())

    def _whole(self) -> Iterator[bytes]:
        self._find()
        generation = -1
        for key in sorted(self._files):
            if key[0] > generation:
                yield from self._unfinished(before=key[0])
                generation = key[0]
            yield from self._files[key].lines()

    def _unfinished(self, before: float = float("inf")) -> Iterator[bytes]:
        """What earlier generations left without an end of line, as they print no more."""
        for key in sorted(self._files):
            if key[0] < before:
                yield from self._files[key].rest()

    def _find(self) -> None:
        """Take in the log files that are there by now."""
        for source, path in self._sources():
            key = (source.generation, source.rank, path.stem)
            if key not in self._files and self.pick.takes(source):
                self._files[key] = _File(path, f"[generation {source.generation}, rank {source.rank}] ".encode())

    def _sources(self) -> Iterator[tuple[Source, Path]]:
        """Every log file that is there, and whose it is."""
        record = Record.read(self.run)
        if record is None:
            return
        folder = Path(record.logs) if record.logs else self.run / "logs"
        for path in folder.glob("attempt-*/rank-*/std*.log"):
            generation, rank = (int(part.rpartition("-")[2]) for part in path.parts[-3:-1])
            count = next((n for first, n in reversed(record.ranks_per_node) if first <= generation), 0)
            yield Source(generation, rank, rank // count if count else -1), path


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: ``0 to 3, 7``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)
