"""What people see while a run goes on: a live panel on a terminal, plain lines elsewhere, a script's own output raw."""

from __future__ import annotations

import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import harmonic_mean
from typing import IO, TYPE_CHECKING, Any

from ..core.rows import RunRow
from ..core.streams import lead_nowhere
from .messages import NodeInfo, RankBeat, Stream

if TYPE_CHECKING:
    from rich.console import RenderableType

_LINE_INTERVAL = 5.0
_UNFINISHED = 0.5  # seconds after which an unfinished line of a script is shown as it is: a prompt, a progress bar


def duration(seconds: float) -> str:
    """``"0.8 s"``, ``"42 s"``, ``"3 min 05 s"``, ``"2 h 07 min"``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class View(ABC):
    """Told of everything, shows what suits its kind. Called from the controller's thread only."""

    @abstractmethod
    def phase(self, text: str) -> None:
        """What is being waited for now."""

    @abstractmethod
    def note(self, text: str) -> None:
        """One line that stays."""

    def nodes(self, nodes: Sequence[NodeInfo], nproc: int) -> None:
        """The nodes are there."""

    def setup(self, facts: Mapping[str, Any]) -> None:
        """The ranks know how long the job is."""

    def row(self, row: RunRow) -> None:
        """A row of metrics."""

    def beats(self, node: int, beats: Sequence[RankBeat]) -> None:
        """Where a node's ranks are."""

    def saved(self, step: int, cost: Mapping[str, float]) -> None:
        """A checkpoint after ``step`` completed steps is complete.

        ``cost`` has its ``stall_seconds``, ``durable_seconds`` and ``bytes``.
        """

    @abstractmethod
    def output(self, rank: int, stream: Stream, text: bytes) -> None:
        """A rank printed ``text``."""

    def close(self) -> None:
        """Nothing more will come."""


@dataclass(frozen=True)
class OutputRules:
    """Which ranks' output a script run shows, as torchrun's --redirects, --tee and --local-ranks-filter say.

    Attributes:
        redirects: streams that go to the log files only, in torchrun's numbers (1 stdout, 2 stderr, 3 both): for all
            local ranks, or by local rank.
        tee: streams shown with torchrun's ``[role0]:`` before each line, likewise.
        local_ranks: local ranks shown; None shows all.
    """

    role: str = "default"
    redirects: int | Mapping[int, int] = 0
    tee: int | Mapping[int, int] = 0
    local_ranks: Collection[int] | None = None

    def prefix(self, rank: int, local: int, stream: Stream) -> bytes | None:
        """What to put before each line of the rank with this local rank; None to show nothing."""
        if self.local_ranks is not None and local not in self.local_ranks:
            return None
        bit = 1 if stream == "stdout" else 2
        tee, redirects = (
            streams if isinstance(streams, int) else streams.get(local, 0) for streams in (self.tee, self.redirects)
        )
        if tee & bit:
            return f"[{self.role}{rank}]:".encode()
        return None if redirects & bit else b""


class ScriptView(View):
    """A script's output as torchrun shows it: raw, each stream to its own; our words go to standard error."""

    def __init__(self, rules: OutputRules, *, quiet: bool) -> None:
        self._rules = rules
        self._quiet = quiet
        self._nproc = 1
        self._partial: dict[tuple[int, Stream], tuple[float, bytes]] = {}
        """What has come of a line without its end, and when that began."""

    def phase(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        if not self._quiet:
            _write(sys.stderr, f"dltrain: {text}\n")

    def nodes(self, nodes: Sequence[NodeInfo], nproc: int) -> None:
        self._nproc = nproc

    def output(self, rank: int, stream: Stream, text: bytes) -> None:
        prefix = self._rules.prefix(rank, rank % self._nproc, stream)
        if prefix is None:
            return
        since, begun = self._partial.pop((rank, stream), (time.monotonic(), b""))
        text = begun + text
        end = text.rfind(b"\n") + 1
        if not prefix:
            end = max(end, text.rfind(b"\r"))  # a progress bar draws its line anew
        if end < len(text):
            # Whole lines, so that ranks' never mix.
            self._partial[rank, stream] = time.monotonic() if end else since, text[end:]
        if end:
            lines = text[: end - 1].split(b"\n") if prefix else ()
            _write(getattr(sys, stream), b"".join(prefix + line + b"\n" for line in lines) or text[:end])

    def beats(self, node: int, beats: Sequence[RankBeat]) -> None:
        self._write_unfinished(before=time.monotonic() - _UNFINISHED)

    def close(self) -> None:
        self._write_unfinished(before=math.inf)

    def _write_unfinished(self, *, before: float) -> None:
        for (rank, stream), (at, rest) in list(self._partial.items()):
            prefix = self._rules.prefix(rank, rank % self._nproc, stream) or b""
            if at < before and (not prefix or before == math.inf):  # a prefix is for whole lines
                _write(getattr(sys, stream), prefix + rest)
                del self._partial[rank, stream]


def _write(out: IO[str], data: bytes | str) -> None:
    """Show text. Where nobody takes it, since a pipe's reader is gone or a disk is full, that ends no run: what is said
    from then on is lost.
    """
    buffer = getattr(out, "buffer", None)
    try:
        if isinstance(data, str):
            out.write(data)
        elif buffer is None:  # a notebook's stream
            out.write(data.decode(errors="replace"))
        else:
            buffer.write(data)
        out.flush()
    except OSError:
        lead_nowhere(out.fileno())


@dataclass
class _State:
    """What both job views keep: how far the run is and how fast it goes."""

    total_steps: int = 0
    begun: float = field(default_factory=time.monotonic)
    last: RunRow | None = None
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque[tuple[float, int]](maxlen=200))
    """Seconds and steps from one row to the next, of the same start of the ranks."""
    fresh: bool = True
    """No row has come from the ranks that are there now."""
    speeds: deque[float] = field(default_factory=lambda: deque[float](maxlen=50))
    """Samples per second of the newest rows; a single step's says little."""

    def begin(self, total_steps: int) -> None:
        """The ranks have been started, for the first time or again."""
        self.total_steps, self.fresh = total_steps, True

    def take(self, row: RunRow) -> None:
        if self.last is not None and not self.fresh:  # what lies before a start is no pace
            self.recent.append((row.at - self.last.at, row.step - self.last.step))
        self.last, self.fresh = row, False
        self.metrics.update(row.metrics)
        if "train/samples_per_second" in row.metrics:
            self.speeds.append(row.metrics["train/samples_per_second"])

    def remaining(self) -> float | None:
        """Seconds to go at the recent pace."""
        seconds, steps = map(sum, zip(*self.recent, strict=True)) if self.recent else (0.0, 0)
        if self.last is None or not self.total_steps or steps <= 0 or seconds <= 0:
            return None
        return (self.total_steps - self.last.step) * seconds / steps

    def line(self) -> str:
        assert self.last is not None
        m = self.metrics
        parts = [f"step {self.last.step}/{self.total_steps}"]
        parts += [f"{name} {m[name]:.4g}" for name in m if name.endswith("loss")]
        parts += [f"{name} {m[name]:.1%}" for name in m if name.endswith("accuracy")]
        if self.speeds:
            parts.append(f"{harmonic_mean(self.speeds):,.0f} samples/s")
        eta = self.remaining()
        if eta is not None and self.last.step < self.total_steps:
            parts.append(f"{duration(eta)} to go")
        return "  ".join(parts)


class _Lines:
    """Puts ranks' output together to lines, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._begun: dict[tuple[int, Stream], bytes] = {}

    def take(self, rank: int, stream: Stream, text: bytes) -> list[str]:
        """The lines that are whole now, with their rank."""
        *whole, rest = (self._begun.pop((rank, stream), b"") + text).split(b"\n")
        if rest:
            self._begun[rank, stream] = rest
        return [f"[rank {rank}] {line.decode(errors='replace')}" for line in whole]

    def rest(self) -> list[str]:
        """What came without an end."""
        return [line for rank, stream in list(self._begun) for line in self.take(rank, stream, b"\n")]


class PlainView(View):
    """Lines, for logs and pipes: every evaluation, and at most one row in five seconds between."""

    def __init__(self) -> None:
        self._state = _State()
        self._lines = _Lines()
        self._shown = 0.0

    def phase(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        _write(sys.stdout, f"{text}\n")

    def setup(self, facts: Mapping[str, Any]) -> None:
        self._state.begin(facts["total_steps"])
        self.note(_setup_line(facts))

    def row(self, row: RunRow) -> None:
        self._state.take(row)
        evaluated = any(name.startswith(("val/", "test/")) for name in row.metrics)
        if evaluated or time.monotonic() - self._shown >= _LINE_INTERVAL:
            self._shown = time.monotonic()
            self.note(self._state.line())

    def output(self, rank: int, stream: Stream, text: bytes) -> None:
        for line in self._lines.take(rank, stream, text):
            self.note(line)

    def close(self) -> None:
        for line in self._lines.rest():
            self.note(line)


def _setup_line(facts: Mapping[str, Any]) -> str:
    samples = ", ".join(f"{count} {name}" for name, count in facts["samples"].items())
    begin = f"from step {facts['start']} " if facts["start"] else ""
    return f"{facts['parameters']:,} parameters; samples: {samples}; {begin}to step {facts['total_steps']}"


class LiveView(View):
    """A panel that stays at the bottom of the terminal: progress, metrics, and the health of each node."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._state = _State()
        self._lines = _Lines()
        self._phase = ""
        self._nodes: Sequence[NodeInfo] = ()
        self._beats: dict[int, tuple[float, Sequence[RankBeat]]] = {}
        self._console = Console()
        render: Callable[[], RenderableType] = self._render
        self._live = Live(get_renderable=render, console=self._console, refresh_per_second=4, transient=True)
        self._live.start()

    def phase(self, text: str) -> None:
        self._phase = text

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def nodes(self, nodes: Sequence[NodeInfo], nproc: int) -> None:
        self._nodes = nodes

    def setup(self, facts: Mapping[str, Any]) -> None:
        self._state.begin(facts["total_steps"])
        self._phase = ""
        self.note(_setup_line(facts))

    def row(self, row: RunRow) -> None:
        self._state.take(row)

    def beats(self, node: int, beats: Sequence[RankBeat]) -> None:
        self._beats[node] = (time.monotonic(), beats)

    def output(self, rank: int, stream: Stream, text: bytes) -> None:
        for line in self._lines.take(rank, stream, text):
            self.note(line)

    def close(self) -> None:
        for line in self._lines.rest():
            self.note(line)
        self._live.stop()
        if self._state.last is not None:
            self.note(self._state.line())

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        state = self._state
        if state.last is None:
            waited = duration(time.monotonic() - state.begun)
            return Spinner("dots", text=Text(f" {self._phase or 'first step'}  {waited}"))
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_row(ProgressBar(total=state.total_steps or 1, completed=state.last.step))
        table = Table.grid(padding=(0, 2))
        for node, info in enumerate(self._nodes):
            table.add_row(*self._node_cells(node, info))
        return Group(Text(state.line()), bar, table)

    def _node_cells(self, node: int, info: NodeInfo) -> tuple[str, ...]:
        heard, beats = self._beats.get(node, (time.monotonic(), ()))
        silence = time.monotonic() - heard
        if silence > 5:
            return (f"node {node}", info.hostname, f"[red]silent for {duration(silence)}[/red]", "")
        steps = [beat.step for beat in beats]
        slow = [beat for beat in beats if beat.age > 10]
        health = f"[yellow]rank {slow[0].rank} in {slow[0].phase} for {duration(slow[0].age)}[/yellow]" if slow else ""
        where = f"steps {min(steps) + 1}–{max(steps) + 1}" if steps else "ended"
        return (f"node {node}", info.hostname, f"{len(beats)} ranks, {where}", health or "[green]healthy[/green]")


def make_view(*, script: bool, rules: OutputRules, quiet: bool) -> View:
    """The view that suits the program and the terminal."""
    if script:
        return ScriptView(rules, quiet=quiet)
    if quiet:
        return ScriptView(rules, quiet=True)
    interactive = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb")
    return LiveView() if interactive else PlainView()
