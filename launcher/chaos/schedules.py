"""Random schedules of faults that everybody can have again: by seed and number."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .faults import KINDS, Fault

_MOST = 3
_KINDS = tuple(word for word, kind in KINDS.items() if not kind.links)  # those that can happen on any machine
_EARLIEST, _LATEST = 0.1, 0.85  # of the run: later ones might find it at its end


def random_schedule(
    seed: int, number: int, *, world: int, nodes: int, steps: int, kinds: Sequence[str] = _KINDS
) -> tuple[Fault, ...]:
    """Schedule ``number`` of ``seed``: one to three faults of ``kinds`` in the middle of a run, in order of steps."""
    draw = random.Random(f"{seed}/{number}")  # noqa: S311  # to be foretold is what it is for
    count = {"rank": world, "node": nodes}
    faults: list[Fault] = []
    for _ in range(draw.randint(1, _MOST)):
        kind = draw.choice(kinds)
        step = draw.randint(max(1, int(steps * _EARLIEST)), max(1, int(steps * _LATEST)))
        unit = KINDS[kind].unit
        faults.append(Fault(kind, draw.randrange(count[unit]) if unit else -1, step))
    return tuple(sorted(faults, key=lambda fault: fault.step or 0))
