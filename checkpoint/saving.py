"""Making one snapshot durable: this rank's shard, the word about it, and, on rank 0, the manifest last. No torch.

Every rank's shard lies beside a small file with the records of its pieces. Rank 0 waits for all of these files, so no
rank needs to be alive for the rest of a save that has been handed over. File names hold the save's own id: nothing
that an earlier save of the same step has written is ever replaced.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..core.storage import Storage
from ..core.tensorfile import nbytes
from .manifest import MANIFEST, CorruptCheckpoint, Manifest, folder_name
from .reader import open_manifest
from .writer import PieceRecord, Planned, commit, make_manifest, shard_name, write_planned

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between attempts at the storage
_RECORDS: TypeAdapter[list[PieceRecord]] = TypeAdapter(list[PieceRecord])
SAVE_ID = "save"
"""Key of a manifest's ``extra`` with the id of the save that wrote it."""


class GivenUp(Exception):  # no error: what it stands for was asked for
    """A save that is not to be gone on with; the text says why."""


@dataclass
class Patience:
    """How long a save may go on. Another thread shortens it.

    Attributes:
        until: end of the wait, by ``time.monotonic()``.
        why: what is said then.
    """

    until: float = float("inf")
    why: str = ""
    _changed: threading.Event = field(default_factory=threading.Event)

    def end(self, why: str, *, within: float = 0.0) -> None:
        """Allow ``within`` seconds more at most."""
        self.until, self.why = min(self.until, time.monotonic() + within), why
        self._changed.set()

    def check(self) -> None:
        """Raises GivenUp when the time is over."""
        if time.monotonic() >= self.until:
            raise GivenUp(self.why)

    def pause(self, seconds: float) -> None:
        """Wait ``seconds``, or until the time is over; raises GivenUp then."""
        end = time.monotonic() + seconds
        while (left := min(end, self.until) - time.monotonic()) > 0:
            self._changed.clear()
            self._changed.wait(min(left, 1.0))
        self.check()


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a snapshot.

    Attributes:
        save: id of this save, the same on every rank.
        plan: the pieces in the order of the file.
        image: their bytes, one after the other.
        facts: on rank 0, what the manifest says beside the tensors (arguments of :func:`~.writer.make_manifest`).
        row: step of the newest row of metrics before it, where that is not on the disk yet.
        taken: Unix time at which the rank began to copy it.
        stall: seconds that training waited for that.
    """

    step: int
    save: str
    rank: int
    world: int
    plan: tuple[Planned, ...]
    image: memoryview
    facts: Mapping[str, Any] | None = None
    row: int = 0
    taken: float = 0.0
    stall: float = 0.0

    @property
    def shard(self) -> str:
        return shard_name(self.rank, self.world, self.save)

    def records_name(self, rank: int) -> str:
        """The file, within the storage, that says what a rank has written."""
        return f"{folder_name(self.step)}/{shard_name(rank, self.world, self.save).removesuffix('safetensors')}json"


@dataclass
class Saving:
    """One snapshot on its way to the storage.

    Attributes:
        on_trouble: told, once until it works again, why the storage fails.
        before_commit: called when every shard is durable; raises GivenUp if there must be no manifest, or OSError.
        wait_for_parts: seconds that another rank's part is waited for; the rank gives up sooner when that has failed.
    """

    storage: Storage
    snapshot: Snapshot
    patience: Patience
    on_trouble: Callable[[str], None]
    before_commit: Callable[[], None]
    wait_for_parts: float = 3600.0

    def run(self) -> int:
        """Return when this rank's part is durable; on rank 0 when the checkpoint is complete, with its tensors' bytes.

        Raises:
            GivenUp: patience ended, or a part of another rank did not come.
            ValueError: the ranks' parts do not fit each other.
        """
        done = self._retried(self._committed)
        if done is not None:  # by a process that was killed before it could say so
            self._tidy()
            return _size(done)
        records = self._retried(self._write_shard)
        if self.snapshot.rank != 0:
            self._retried(lambda: self._write_records(records))
            return 0
        for rank in range(1, self.snapshot.world):
            records += self._part_of(rank)
        assert self.snapshot.facts is not None, "rank 0 knows what the manifest says"
        facts = dict(self.snapshot.facts)
        facts["extra"] = {**facts["extra"], SAVE_ID: self.snapshot.save}
        manifest = make_manifest(records, step=self.snapshot.step, world=self.snapshot.world, **facts)
        self._retried(lambda: self._commit(manifest))
        self._tidy()
        return _size(manifest)

    def _committed(self) -> Manifest | None:
        step = self.snapshot.step
        if not self.storage.exists(f"{folder_name(step)}/{MANIFEST}"):
            return None
        try:
            found = open_manifest(self.storage, step)
        except CorruptCheckpoint:
            return None
        return found if found.extra.get(SAVE_ID) == self.snapshot.save else None

    def _write_shard(self) -> list[PieceRecord]:
        snapshot = self.snapshot
        if not snapshot.plan:
            return []
        path = snapshot.shard
        return write_planned(self.storage, snapshot.step, path, snapshot.plan, self._pieces())

    def _pieces(self) -> Iterator[memoryview]:
        begin = 0
        for planned in self.snapshot.plan:
            self.patience.check()
            end = begin + planned.key.nbytes
            yield self.snapshot.image[begin:end]
            begin = end

    def _write_records(self, records: list[PieceRecord]) -> None:
        self.storage.write(self.snapshot.records_name(self.snapshot.rank), [_RECORDS.dump_json(records)])

    def _part_of(self, rank: int) -> list[PieceRecord]:
        """What another rank has written, once it has."""
        name, pause = self.snapshot.records_name(rank), 0.01
        deadline = time.monotonic() + self.wait_for_parts
        while not self._retried(lambda: self.storage.exists(name)):
            if time.monotonic() > deadline:
                raise GivenUp(f"rank {rank} has not written its part within {self.wait_for_parts:g} s")
            try:
                self.patience.pause(pause)
            except GivenUp as ended:
                raise GivenUp(f"{ended}; rank {rank} has not written its part") from None
            pause = min(pause * 1.5, 1.0)
        raw = self._retried(lambda: self.storage.read(name))
        try:
            return _RECORDS.validate_json(raw)
        except ValidationError as error:
            raise ValueError(f"{name} is damaged: {error.errors()[0]['msg']}") from None

    def _commit(self, manifest: Manifest) -> None:
        self.before_commit()
        commit(self.storage, manifest)

    def _tidy(self) -> None:
        """Remove what only the save needed. What stays behind is in nobody's way, and goes with the checkpoint."""
        if self.snapshot.rank == 0:
            try:
                for rank in range(1, self.snapshot.world):
                    self.storage.remove(self.snapshot.records_name(rank))
            except OSError:
                return

    def _retried(self, call: Callable[[], T]) -> T:
        """``call``'s result; a failing storage is tried again, less and less often, as long as patience lasts."""
        pause, failed, told = _FIRST_PAUSE, False, False
        while True:
            self.patience.check()
            try:
                result = call()
            except OSError as error:
                why = f"{type(error).__name__}: {error}"
                if failed and not told:  # a hiccup is not worth a word
                    self.on_trouble(why)
                    told = True
                failed = True
                try:
                    self.patience.pause(pause)
                except GivenUp as ended:
                    raise GivenUp(f"{ended}; {why}") from None
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                if told:
                    self.on_trouble("")
                return result


def _size(manifest: Manifest) -> int:
    return sum(nbytes(entry.dtype, entry.shape) for entry in manifest.tensors.values())


def snapshot_from(raw: bytes, image: memoryview) -> Snapshot:
    """The snapshot that :func:`description` describes."""
    from .writer import PieceKey

    values = json.loads(raw)
    plan = tuple(
        Planned(PieceKey(fqn, tuple(offset), tuple(shape), dtype, nbytes), tuple(whole))
        for fqn, offset, shape, dtype, nbytes, whole in values.pop("plan")
    )
    return Snapshot(**values, plan=plan, image=image)


def description(snapshot: Snapshot) -> bytes:
    """Everything of a snapshot but its image, as JSON."""
    plan = [[*planned.key, planned.whole] for planned in snapshot.plan]
    fields = ("step", "save", "rank", "world", "facts", "row", "taken", "stall")
    return json.dumps({**{name: getattr(snapshot, name) for name in fields}, "plan": plan}).encode()
