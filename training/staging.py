"""Memory that a rank's snapshots are copied into, and that another process can read when the rank is gone."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.image import DATA, Head, number_copied, put_head, read_head, unmark
from ..checkpoint.tensors import typed
from ..checkpoint.writer import PieceKey, Planned, held, plan_shard
from ..core.contracts import ShardedState

_ALIGNMENT = 64


@dataclass(frozen=True)
class _Known:
    """A tensor as it was last seen. Its views keep its memory from being given to another."""

    place: tuple[int, torch.Size, tuple[int, ...], torch.dtype]
    keys: tuple[PieceKey, ...]
    views: tuple[Tensor, ...]


class Holdings:
    """The pieces that a rank holds: looked at anew only where a tensor is not the one that it was."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._views: tuple[ImagePlan | None, list[Tensor]] = (None, [])

    def refresh(self, shards: ShardedState) -> bool:
        """Take over an engine's state; whether there are other pieces than before. What they hold does not matter."""
        changed = shards.keys() != self._known.keys()
        if changed:
            self._known = {fqn: known for fqn, known in self._known.items() if fqn in shards}
        for fqn, shard in shards.items():
            data = shard.data
            place = data.data_ptr(), data.shape, data.stride(), data.dtype
            before = self._known.get(fqn)
            if before is not None and before.place == place:
                continue
            views = tuple(box.data.detach() for box in shard.boxes())
            self._known[fqn] = _Known(place, tuple(held({fqn: shard})), views)
            changed = changed or before is None or before.keys != self._known[fqn].keys
            self._views = (None, [])
        return changed

    def keys(self) -> list[PieceKey]:
        """The pieces, by name."""
        return [key for _, known in sorted(self._known.items()) for key in known.keys]

    def views(self, plan: ImagePlan) -> list[Tensor]:
        """The live data of the planned pieces."""
        if self._views[0] is not plan:
            known = self._known.values()
            found = {key: view for each in known for key, view in zip(each.keys, each.views, strict=True)}
            self._views = plan, [found[planned.key] for planned in plan.pieces]
        return self._views[1]


class ImagePlan:
    """Which pieces a rank's image holds, and where.

    Args:
        durable: those that it writes into a checkpoint; they come first, without gaps.
        held: those that the image holds: the durable ones are among them.
        facts: what a manifest says that does not change from one snapshot to the next.

    Attributes:
        save: id that all saves under this plan have.
        text: the first line of an image's text.
    """

    def __init__(
        self,
        shards: ShardedState,
        durable: Sequence[PieceKey],
        held: Sequence[PieceKey],
        *,
        save: str,
        facts: Mapping[str, Any],
    ) -> None:
        self.save = save
        self.facts = dict(facts)
        self.durable = tuple(plan_shard(shards, durable))
        written = set(durable)
        rest = plan_shard(shards, [key for key in held if key not in written])
        self.pieces = (*self.durable, *rest)
        self.begins: list[int] = []
        end = 0
        for index, planned in enumerate(self.pieces):
            if index == len(self.durable):
                end += -end % _ALIGNMENT
            self.begins.append(end)
            end += planned.key.nbytes
        self.size = end
        pieces = [[*key, whole, begin] for (key, whole), begin in zip(self.pieces, self.begins, strict=True)]
        self.text = json.dumps({**facts, "plan": pieces}, separators=(",", ":")).encode()


class Stage:
    """Anonymous memory behind a descriptor: it has no name, so nothing can be left behind.

    It is used for one snapshot after the other: touching new pages costs more than copying into them.

    Attributes:
        fd: descriptor of the memory, to be passed on.
        capacity: bytes that pieces have room in.
    """

    def __init__(self, fd: int, capacity: int, number: int = 0) -> None:
        self.fd, self.capacity = fd, capacity
        self._number = number
        self._memory = mmap.mmap(fd, DATA + capacity)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)[DATA:]
        self._views: tuple[ImagePlan | None, list[Tensor]] = (None, [])

    @classmethod
    def of_size(cls, size: int) -> Stage:
        """New memory."""
        fd = os.memfd_create("dltrain-snapshot")
        capacity = size + -size % _ALIGNMENT
        os.ftruncate(fd, DATA + capacity)
        return cls(fd, capacity)

    @classmethod
    def adopted(cls, fd: int) -> Stage | None:
        """Memory that an earlier rank has left; None where it is none."""
        found = read_head(fd)
        return None if found is None else cls(fd, found[0].capacity, found[0].number)

    def fill(self, plan: ImagePlan, holdings: Holdings) -> None:
        """Copy the planned pieces here. What was here does not count any more."""
        put_head(self._memory, self._head(), counts=False)
        if self._views[0] is not plan:
            self._views = plan, [self._view(planned, at) for planned, at in zip(plan.pieces, plan.begins, strict=True)]
        if not plan.pieces:  # others hold all there is
            return
        with torch.no_grad():
            torch._foreach_copy_(self._views[1], holdings.views(plan))  # pyright: ignore[reportPrivateImportUsage]  # documented

    def commit(self, plan: ImagePlan, text: bytes, **position: int) -> None:
        """Make the image count, with ``text`` beside the pieces; ``position`` are the other fields of its head."""
        done = 0
        while done < len(text):
            done += os.pwrite(self.fd, text[done:], DATA + self.capacity + done)
        put_head(self._memory, self._head(data=plan.size, text=len(text), **position), counts=True)

    @property
    def copied(self) -> bool:
        """Whether another node has a copy of what this holds."""
        return number_copied(self.fd) == self._number

    def unmark(self) -> None:
        """Have it kept for a copy no more."""
        unmark(self._memory)

    def _head(self, **values: int) -> Head:
        self._number += 1
        fields = dict.fromkeys(("generation", "step", "rank", "world", "row", "data", "text", "marked"), 0)
        return Head(**{**fields, **values}, number=self._number, capacity=self.capacity)

    def _view(self, planned: Planned, begin: int) -> Tensor:
        key = planned.key
        return typed(self._bytes[begin : begin + key.nbytes], key.dtype).view(key.shape)

    def close(self) -> None:
        os.close(self.fd)
