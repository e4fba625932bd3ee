"""What a peer's configuration says, by key and place, and what becomes of it here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ...core.document import Document
from ...core.suggest import nearest


@dataclass(frozen=True)
class Said:
    """One value that a peer's file or command line gives.

    Attributes:
        place: where, such as ``"config.yaml:12"``.
        key: what the peer calls it, dotted.
        value: what it says.
    """

    place: str
    key: str
    value: Any

    def __str__(self) -> str:
        return f"{self.place}: {self.key}"


@dataclass
class Imported:
    """What peers' files come to.

    Attributes:
        values: by a job's dotted key, the value and what it is taken from.
        environment: variables that Accelerate's launcher would set for the script.
        native: what is left for a DeepSpeed configuration of the job's own.
        without: by the reason, what has no equivalent in a job.
        unknown: what no table here knows, and a hint.
        hostfile: hosts to start on.
        options: further options of ``dltrain launch``.
        target: the script and its arguments.
        sources: the files that were read.
    """

    values: dict[str, tuple[Any, Said]] = field(default_factory=dict[str, tuple[Any, Said]])
    environment: dict[str, str] = field(default_factory=dict[str, str])
    native: dict[str, Said] = field(default_factory=dict[str, Said])
    without: dict[str, list[Said]] = field(default_factory=dict[str, list[Said]])
    unknown: list[tuple[Said, str]] = field(default_factory=list[tuple[Said, str]])
    hostfile: Path | None = None
    options: tuple[str, ...] = ()
    target: tuple[str, ...] = ("train.py",)
    sources: list[str] = field(default_factory=list[str])

    def put(self, key: str, value: Any, said: Said) -> None:
        """Take ``value`` for the job's ``key``; a later file wins over an earlier one."""
        self.values[key] = (value, said)

    def leave(self, said: Said, why: str) -> None:
        """Note that there is nothing like it, and why."""
        self.without.setdefault(why, []).append(said)

    def get(self, key: str, default: Any = None) -> Any:
        """What the job's ``key`` is so far."""
        return self.values[key][0] if key in self.values else default

    @property
    def ranks(self) -> int | None:
        """Ranks that hold different samples, where the files say how many there are."""
        per_node = self.get("resources.nproc_per_node")
        if not isinstance(per_node, int):
            return None
        together = self.get("parallel.tensor", 1) * self.get("parallel.pipeline", 1)
        return self.get("resources.nodes", 1) * per_node // together


class Settings:
    """Values by name, each of which is taken once; what nobody takes is in the end left, or unknown."""

    def __init__(self, said: Mapping[str, Said]) -> None:
        self._said = dict(said)
        self._rest = dict(said)

    def __contains__(self, name: str) -> bool:
        return name in self._said

    def take(self, name: str) -> Said | None:
        """The value of ``name``, None where there is none or it is ``null``."""
        self._rest.pop(name, None)
        said = self._said.get(name)
        return said if said is not None and said.value is not None else None

    def value(self, name: str, default: Any) -> Any:
        """Like :meth:`take`, only the value."""
        said = self.take(name)
        return default if said is None else said.value

    def names(self) -> Iterator[str]:
        """All names, in the order of the file."""
        return iter(self._said)

    def left(self) -> list[str]:
        """Names that nobody has taken."""
        return list(self._rest)

    def settle(self, into: Imported, why: Mapping[str, str], known: Sequence[str]) -> None:
        """Account for what was not taken: by its reason in ``why``, else as unknown, with the nearest of ``known``."""
        for name, said in self._rest.items():
            if name in why:
                into.leave(said, why[name])
            else:
                near = nearest(name, [*known, *why, *self._said.keys() - self._rest.keys()])
                into.unknown.append((said, f"did you mean '{near}'?" if near else ""))
        self._rest.clear()


def reasons(table: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A table of names by reason, turned round."""
    return {name: why for why, names in table.items() for name in names}


def flatten(document: Document, name: str) -> dict[str, Said]:
    """Every value of a document by its dotted key; empty sections are left out, lists are values."""
    return dict(_leaves(document, name, (), document.value))


def _leaves(document: Document, name: str, key: tuple[str, ...], value: Any) -> Iterator[tuple[str, Said]]:
    if isinstance(value, dict):
        for word, below in cast("dict[str, Any]", value).items():
            yield from _leaves(document, name, (*key, word), below)
    else:
        dotted = ".".join(key)
        yield dotted, Said(f"{name}:{document.lines[key]}", dotted, value)


def is_on(value: Any) -> bool:
    """Whether a switch is on, which files give as a boolean or in words."""
    return str(value).lower() in ("true", "1", "yes")
