"""Faults as people write them: ``kill:rank=3@step=50, partition:node=1@300/5s``. Text to values and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ...core.errors import JobError, Problem, did_you_mean

Unit = Literal["rank", "node", ""]

_ITEM = re.compile(r"(?P<kind>[^:@]*)(?::(?P<target>[^@]*))?(?:@(?P<when>.*))?")
_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?s")
_EXAMPLE = "as kill:rank=3@step=50, or driver@12.5s"


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        unit: what one of it hits.
        does: what happens to that.
        interrupts: whether training is interrupted by it.
        lasts: it is over after a time, which is to be said: ``/5s``.
        links: it needs nodes with links of their own.
    """

    unit: Unit
    does: str
    interrupts: bool = True
    lasts: bool = False
    links: bool = False


#: Every kind, by the word for it.
KINDS: Mapping[str, Kind] = {
    "kill": Kind("rank", "the rank gets SIGKILL, as from the kernel when memory runs out"),
    "segv": Kind("rank", "the rank gets SIGSEGV, as after a bug in native code"),
    "stop": Kind("rank", "the rank gets SIGSTOP: it hangs, and stays"),
    "term": Kind("rank", "the rank gets SIGTERM, the notice that its node is about to be taken away"),
    "persister": Kind("rank", "the process that writes the rank's checkpoints gets SIGKILL", interrupts=False),
    "node": Kind("node", "the node's agent and all its ranks get SIGKILL"),
    "driver": Kind("", "the launcher gets SIGKILL, and the same command is started again"),
    "partition": Kind("node", "the node's link is cut, and mended after the given time", lasts=True, links=True),
}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: a word of :data:`KINDS`.
        target: number of the rank or node; -1 where the kind takes none.
        step: it happens once the target (any rank of the node, or of all) has been seen with so many steps done.
        seconds: or so long after the first rank came to its first step; one of the two is None.
        lasts: seconds until it is over, for kinds that are over some time.
    """

    kind: str
    target: int = -1
    step: int | None = None
    seconds: float | None = None
    lasts: float | None = None

    def __str__(self) -> str:
        unit = KINDS[self.kind].unit
        whom = f":{unit}={self.target}" if unit else ""
        when = f"step={self.step}" if self.step is not None else f"{self.seconds:g}s"
        return f"{self.kind}{whom}@{when}" + (f"/{self.lasts:g}s" if self.lasts is not None else "")


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The faults of a list with commas.

    Raises:
        JobError: with every problem of the text.
    """
    problems: list[Problem] = []
    faults: list[Fault] = []
    for item in (part.strip() for part in text.split(",")):
        try:
            if item:
                faults.append(_parse(item))
        except _Wrong as wrong:
            problems.append(Problem(wrong.what, f"--faults, '{item}'", wrong.hint))
    if not faults and not problems:
        problems.append(Problem("there is no fault in it", "--faults", _EXAMPLE))
    if problems:
        raise JobError(*problems)
    return tuple(faults)


def check_faults(faults: tuple[Fault, ...], *, world: int, nodes: int, steps: int | None = None) -> list[Problem]:
    """What of ``faults`` cannot happen to ``world`` ranks on ``nodes`` nodes, and in ``steps`` if that is known."""
    problems: list[Problem] = []
    count = {"rank": world, "node": nodes}
    for fault in faults:
        where = f"--faults, '{fault}'"
        unit = KINDS[fault.kind].unit
        if unit and fault.target >= count[unit]:
            problems.append(Problem(f"there is no {unit} {fault.target}", where, f"{unit}s are 0 to {count[unit] - 1}"))
        if steps is not None and fault.step is not None and fault.step >= steps:
            problems.append(Problem(f"the run has {steps} steps", where, f"a step before {steps}"))
    return problems


class _Wrong(Exception):
    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


def _parse(item: str) -> Fault:
    match = _ITEM.fullmatch(item)
    assert match is not None, "the pattern takes any text"
    word = match["kind"].strip()
    if word not in KINDS:
        raise _Wrong(f"no fault is called '{word}'", did_you_mean(word, KINDS))
    target = _target(word, KINDS[word].unit, match["target"])
    if match["when"] is None:
        raise _Wrong("it does not say when", "add @step=50, or @12.5s")
    when, slash, lasts = match["when"].partition("/")
    step, seconds = _when(when.strip())
    return Fault(word, target, step, seconds, _lasts(word, lasts.strip() if slash else None))


def _target(kind: str, unit: Unit, text: str | None) -> int:
    if not unit:
        if text is not None:
            raise _Wrong(f"'{kind}' takes no '{text.strip()}'", f"write {kind}@…")
        return -1
    if text is None:
        raise _Wrong(f"it does not say which {unit}", f"write {kind}:{unit}=0@…")
    name, equals, number = text.rpartition("=")
    if equals and name.strip() != unit:
        raise _Wrong(f"'{kind}' happens to a {unit}, not a '{name.strip()}'", f"write {kind}:{unit}={number.strip()}@…")
    if not number.strip().isdecimal():
        raise _Wrong(f"'{number.strip()}' is no number of a {unit}", f"write {kind}:{unit}=0@…")
    return int(number)


def _when(text: str) -> tuple[int | None, float | None]:
    name, equals, value = (part.strip() for part in text.rpartition("="))
    hint = "write @step=50, or @12.5s"
    if equals and name != "step":
        raise _Wrong(f"'{name}' is no measure of time", hint)
    if value.isdecimal():
        return int(value), None
    if not equals and _SECONDS.fullmatch(value):
        return None, float(value[:-1])
    raise _Wrong(f"'{value}' is no {'step' if equals else 'step or time'}", hint)


def _lasts(kind: str, text: str | None) -> float | None:
    if not KINDS[kind].lasts:
        if text is not None:
            raise _Wrong(f"'{kind}' is never over", f"leave out /{text}")
        return None
    if text is None:
        raise _Wrong("it does not say for how long", "add /5s")
    if not _SECONDS.fullmatch(text) or not float(text[:-1]):
        raise _Wrong(f"'{text}' is no length of time", "write /5s")
    return float(text[:-1])
