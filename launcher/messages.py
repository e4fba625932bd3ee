"""What controller, node agents, fork servers and ranks say to each other. Values only, all JSON-able.

Field names are the contract between processes that may run on different machines, so they change with the version.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

ChildKind = Literal["worker", "script", "store", "check", "probe"]
TargetKind = Literal["file", "module", "program"]
Stream = Literal["stdout", "stderr"]


@dataclass(frozen=True)
class Target:
    """A user's program: a Python file, a module (``-m``), or any executable (``--no-python``)."""

    kind: TargetKind
    name: str
    args: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"-m {self.name}" if self.kind == "module" else self.name


@dataclass(frozen=True)
class ChildSpec:
    """A process to fork: what to run, and the surroundings that a fresh process would have been given.

    Attributes:
        kind: which entry of ``launcher/entry.py`` runs.
        label: name shown by ``ps`` and ``top`` (15 bytes are seen).
        env: the whole environment.
        cwd: working directory.
        threads: intra-op threads that torch may use; None leaves what the environment says.
        cpus: cores to run on; empty leaves the server's own.
        fresh: start a new interpreter instead of continuing the fork.
        body: the arguments of the entry.
    """

    kind: ChildKind
    label: str
    env: dict[str, str]
    cwd: str
    threads: int | None = None
    cpus: tuple[int, ...] = ()
    fresh: bool = False
    body: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        assert data["kind"] in get_args(ChildKind)
        fields: dict[str, Any] = {**data, "cpus": tuple(data["cpus"])}
        return cls(**fields)


@dataclass(frozen=True)
class Exit:
    """How a child ended: ``code`` when it exited, ``signal`` when one killed it; ``at`` is Unix time in seconds."""

    code: int | None
    signal: int | None
    at: float
    max_rss: int = 0
    """Peak resident memory in bytes, as the kernel counted it."""

    @property
    def ok(self) -> bool:
        return self.code == 0


@dataclass(frozen=True)
class RankPlan:
    """One rank of a generation, as the controller hands it to the rank's node agent."""

    rank: int
    local_rank: int
    child: ChildSpec
    log_dir: str
    """Folder of this rank's stdout.log, stderr.log and error.json; the agent creates it."""


@dataclass(frozen=True)
class NodeInfo:
    """What a node agent says of its machine."""

    node: int
    hostname: str
    address: str
    ray_node: str
    pid: int
    interface: str | None
    """Name of the network interface that has ``address``."""
    cores: tuple[int, ...]
    cpus: int
    """How many of the cores its processes may keep busy."""
    numa: tuple[tuple[int, ...], ...]
    """``cores`` by NUMA node."""
    gpus: tuple[str, ...]
    versions: dict[str, str]
    shares_run_dir: bool = True
    """Whether it sees the run directory, and so writes its ranks' logs there itself."""


@dataclass(frozen=True)
class Point:
    """A snapshot: the generation that took it, after how many steps, with how many ranks."""

    generation: int
    step: int
    world: int


@dataclass(frozen=True)
class HeldImage:
    """One rank's part of a snapshot, complete in a node's memory.

    Attributes:
        row: step of the newest row of metrics before it; 0 where there is none.
        size: in bytes.
    """

    generation: int
    step: int
    rank: int
    world: int
    row: int
    size: int

    @property
    def point(self) -> Point:
        """The snapshot that it is a part of."""
        return Point(self.generation, self.step, self.world)


@dataclass(frozen=True)
class RankEvent:
    """Something that happened to a rank; ``kind`` says which of the fields below it carries.

    ``message``: the rank said ``data``. ``log``: it printed ``text`` on ``stream``. ``exit``: it ended as ``exit``.
    ``closed``: it ended and its whole output has been delivered.
    """

    kind: Literal["started", "message", "log", "exit", "closed"]
    generation: int
    rank: int
    data: dict[str, Any] = field(default_factory=dict)
    stream: Stream = "stdout"
    text: bytes = b""
    exit: Exit | None = None
    pid: int = 0


@dataclass(frozen=True)
class RankBeat:
    """Where a rank is: optimizer step (-1 before the first), phase, and seconds since it got there; its process."""

    rank: int
    step: int
    phase: str
    age: float
    pid: int = 0
    """On its node; 0 while it is being forked."""


@dataclass(frozen=True)
class AgentReport:
    """The answer to one poll of a node agent: what happened since the last, and every living rank's pulse."""

    events: list[RankEvent]
    beats: list[RankBeat]
