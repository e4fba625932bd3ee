"""Whether the node agents are there: asked in a thread of its own, whatever the controller is busy with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from . import untyped
from .agent import BEAT

_ROUND = 0.25
_QUIET = 1.0  # seconds after which one that has said nothing is asked
_GLANCE = 0.5  # most seconds that count between two looks: when this process was held up, agents have not been silent


@dataclass
class _Heard:
    agent: Any
    quiet: float = 0.0
    asked: Any = None
    gone: str = ""


class Heartbeats:
    """Keeps count of the silence of every agent it was told of. Methods may be called from any thread.

    Only time is counted in which this process has looked, so one that gets no core blames nobody.

    Args:
        loss_of: the words for an agent that died, from the error of a call to it.
    """

    def __init__(self, loss_of: Callable[[Exception], str]) -> None:
        self._loss_of = loss_of
        self._lock = threading.Lock()
        self._agents: list[_Heard] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dltrain-heartbeats", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._over.set()
        self._thread.join(5)

    def watch(self, agents: Iterable[Any]) -> None:
        """Count these agents' silence, from now on where they are new, and no others'."""
        with self._lock:
            known = {id(heard.agent): heard for heard in self._agents}
            self._agents = [known.get(id(agent), _Heard(agent)) for agent in agents]

    def heard(self, agent: Any) -> None:
        """It has answered."""
        with self._lock:
            for heard in self._agents:
                if heard.agent is agent:
                    heard.quiet = 0.0

    def silence(self, agent: Any) -> float:
        """For how many seconds it has not answered."""
        with self._lock:
            return next((heard.quiet for heard in self._agents if heard.agent is agent), 0.0)

    def gone(self, agent: Any) -> str:
        """What is known of its end, if it has ended; else empty."""
        with self._lock:
            return next((heard.gone for heard in self._agents if heard.agent is agent), "")

    def _run(self) -> None:
        ray = untyped.ray()
        looked = time.monotonic()
        while not self._over.wait(_ROUND):
            looked, before = time.monotonic(), looked
            with self._lock:
                agents = [heard for heard in self._agents if not heard.gone]
                for heard in agents:
                    heard.quiet += min(looked - before, _GLANCE)
            for heard in agents:
                if heard.asked is None and heard.quiet > _QUIET:
                    heard.asked = heard.agent.beat.options(concurrency_group=BEAT).remote()
            asked = [heard for heard in agents if heard.asked is not None]
            if not asked:
                continue
            refs = [heard.asked for heard in asked]
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            for heard in asked:
                if heard.asked in ready:
                    self._take(heard)

    def _take(self, heard: _Heard) -> None:
        ray = untyped.ray()
        gone = ""
        try:
            ray.get(heard.asked)
        except ray.exceptions.RayError as error:
            gone = self._loss_of(error)
        with self._lock:
            heard.asked, heard.gone = None, gone
            heard.quiet = 0.0
