"""The output that a run's ranks left, of all generations, read to the end or followed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .rundir import Record
from .runs import standing

_CHUNK = 1 << 20
_POLL = 0.2
_QUIET = 3  # looks without news after the end: ranks of a killed driver are killed a moment later


@dataclass(frozen=True)
class Pick:
    """Whose output; None is everybody's."""

    ranks: Collection[int] | None = None
    nodes: Collection[int] | None = None
    generations: Collection[int] | None = None

    def takes(self, generation: int, rank: int, ranks_per_node: int) -> bool:
        """Whether it takes this rank's output; ``ranks_per_node`` is 0 where that is not known."""
        node = rank // ranks_per_node if ranks_per_node else -1
        return (
            (self.generations is None or generation in self.generations)
            and (self.ranks is None or rank in self.ranks)
            and (self.nodes is None or node in self.nodes)
        )


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

    def read(self) -> Iterator[bytes]:
        """The lines that are there, also one that has not ended yet."""
        yield from self._whole()
        yield from self._unfinished()

    def follow(self) -> Iterator[bytes]:
        """The lines that are there and all that come, until the run has ended."""
        quiet = 0
        while quiet < _QUIET:
            over = self._over()  # asked first: what was printed before the end is read after it
            before = self._read_so_far()
            yield from self._whole()
            idle = self._read_so_far() == before
            quiet = quiet + 1 if over and idle else 0
            if idle:
                time.sleep(_POLL)
        yield from self._unfinished()

    def _over(self) -> bool:
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
        record = Record.read(self.run)
        if record is None:
            return
        folder = Path(record.logs) if record.logs else self.run / "logs"
        for path in folder.glob("attempt-*/rank-*/std*.log"):
            generation, rank = (int(part.rpartition("-")[2]) for part in path.parts[-3:-1])
            count = next((n for first, n in reversed(record.ranks_per_node) if first <= generation), 0)
            key = (generation, rank, path.stem)
            if key not in self._files and self.pick.takes(generation, rank, count):
                self._files[key] = _File(path, f"[generation {generation}, rank {rank}] ".encode())
