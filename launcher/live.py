"""``status.json``: how a run stands now, written by its driver for whoever looks from another shell."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import RunFailed
from ..core.rows import RunRow
from .goodput import Goodput
from .interrupt import StopRequests
from .messages import NodeInfo, RankBeat, Stream
from .rundir import RunDir
from .view import View

FILE = "status.json"
_INTERVAL = 1.0


class Live(View):
    """Passes everything on to ``inner``, and writes ``status.json`` about once a second, and at once at a turn.

    A disk that takes nothing is no reason to disturb the run: the file is then old.
    """

    def __init__(self, inner: View, run: RunDir, goodput: Goodput, stop: StopRequests, *, stop_grace: float) -> None:
        self._inner, self._run, self._goodput, self._stop = inner, run, goodput, stop
        self._first = run.record.generations
        self._beats: dict[int, Sequence[RankBeat]] = {}
        self._written = 0.0
        self._seen_stops = 0
        self._facts: dict[str, Any] = {
            "phase": "",
            "step": run.record.step,
            "total_steps": 0,
            "nodes": [],
            "ranks_per_node": 0,
            "checkpoint": None,
            "starts": [],
            "checkpoint_cost": {},
            "stop_grace": stop_grace,
        }

    def phase(self, text: str) -> None:
        self._inner.phase(text)
        self._write(phase=text)

    def note(self, text: str) -> None:
        self._inner.note(text)

    def nodes(self, nodes: Sequence[NodeInfo], nproc: int) -> None:
        self._inner.nodes(nodes, nproc)
        self._beats.clear()
        self._write(nodes=[node.hostname for node in nodes], ranks_per_node=nproc)

    def setup(self, facts: Mapping[str, Any]) -> None:
        self._inner.setup(facts)
        starts = [*self._facts["starts"], (self._run.record.generations - 1, facts["start"])]
        self._write(phase="", total_steps=facts["total_steps"], checkpoint=facts["start"] or None, starts=starts)

    def row(self, row: RunRow) -> None:
        self._inner.row(row)
        self._facts["step"] = row.step

    def saved(self, step: int, cost: Mapping[str, float]) -> None:
        self._inner.saved(step, cost)
        self._facts |= {"checkpoint": step, "checkpoint_cost": dict(cost)}

    def beats(self, node: int, beats: Sequence[RankBeat]) -> None:
        self._inner.beats(node, beats)
        before, self._beats[node] = self._beats.get(node, ()), beats
        if any(beat.phase == "user" for beat in beats):  # a script: its ranks do not say when they are set up
            self._facts["phase"] = ""
        turn = self._stop.count > self._seen_stops or [b.pid for b in beats] != [b.pid for b in before]
        if turn or time.monotonic() - self._written >= _INTERVAL:
            self._write()

    def output(self, rank: int, stream: Stream, text: bytes) -> None:
        self._inner.output(rank, stream, text)

    def close(self) -> None:
        """Write the last word. The inner view goes on."""
        self._beats.clear()
        self._write(phase="")

    def _write(self, **changes: Any) -> None:
        self._facts.update(changes)
        self._written, self._seen_stops = time.monotonic(), self._stop.count
        now, generations = time.time(), self._run.record.generations
        ranks = [
            {"rank": b.rank, "node": node, "step": b.step, "phase": b.phase, "seconds": round(b.age, 1), "pid": b.pid}
            for node, beats in sorted(self._beats.items())
            for b in beats
        ]
        status = {
            "at": now,
            "generation": generations - 1,
            "restarts": max(0, generations - self._first - 1),
            **self._facts,
            "ranks": ranks,
            "goodput": self._goodput.ratio(now),
            "seconds": self._goodput.shares(now),
            "stragglers": self._goodput.stragglers.found(),
            "stop_requests": self._stop.count,
        }
        with contextlib.suppress(RunFailed):
            self._run.write(FILE, json.dumps(status) + "\n", sync=False)
