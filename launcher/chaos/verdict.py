"""What a run came to, and in what it differs from a run that nothing happened to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ...checkpoint.reader import catalogue, open_manifest
from ...core.storage import Storage
from ...tracking.journal import read_rows

#: Metrics that differ between any two runs: a clock gives them, or says in which row they stand.
_TIMES, _AT_THEIR_TIME = ("_seconds", "_per_second"), ("checkpoint/",)


@dataclass(frozen=True)
class Trace:
    """What a run left that must not depend on what happened on the way.

    Attributes:
        weights: SHA-256 of the file with the final weights.
        rows: by step, the metrics, without those that a clock gives.
        steps: the steps of the metrics, as they stand there.
        world: how many ranks wrote the last checkpoint.
        samples: how many samples the run has consumed.
        state: hash of each tensor in the last checkpoint, averages and the optimizer's included.
    """

    weights: str
    rows: dict[int, dict[str, Any]]
    steps: tuple[int, ...]
    world: int
    samples: int
    state: dict[str, str]

    @classmethod
    def read(cls, run: Path) -> Self:
        """The trace of a finished run.

        Raises:
            OSError: something of it is not there.
            RunFailed: its last checkpoint is damaged.
        """
        weights = hashlib.sha256((run / "weights.safetensors").read_bytes()).hexdigest()
        journal = list(read_rows(run / "metrics.jsonl"))
        rows = {row.step: {name: value for name, value in row.metrics.items() if _computed(name)} for row in journal}
        storage = Storage(str(run / "checkpoints"))
        last = open_manifest(storage, catalogue(storage)[0].step)
        state = {name: "+".join(block.hash for block in entry.blocks()) for name, entry in last.tensors.items()}
        return cls(weights, rows, tuple(row.step for row in journal), last.world, last.cursor.samples, state)


def differences(trace: Trace, clean: Trace) -> list[str]:
    """In what ``trace`` is another than ``clean``, in a few words each; nothing where they are the same to the bit."""
    return list(_differences(trace, clean))


def _differences(trace: Trace, clean: Trace) -> Iterator[str]:
    if trace.weights != clean.weights:
        yield f"weights are {trace.weights[:12]}, not {clean.weights[:12]}"
    if trace.steps != clean.steps:
        yield _of_steps(trace.steps, clean.steps)
    other = [step for step, row in sorted(trace.rows.items()) if row != clean.rows.get(step, row)]
    if other:
        row, was = trace.rows[other[0]], clean.rows[other[0]]
        names = [name for name in sorted(row.keys() | was.keys()) if row.get(name) != was.get(name)]
        yield f"metrics differ from step {other[0]} on ({', '.join(names[:3])})"
    if trace.samples != clean.samples:
        yield f"{trace.samples} samples were consumed, not {clean.samples}"
    if trace.world != clean.world:  # then the state is cut into other pieces, and only the weights can be compared
        return
    names = sorted(trace.state.keys() | clean.state.keys())
    tensors = [name for name in names if trace.state.get(name) != clean.state.get(name)]
    if tensors:
        yield f"{len(tensors)} tensors of the last checkpoint differ ({', '.join(tensors[:2])})"


def _of_steps(steps: tuple[int, ...], clean: tuple[int, ...]) -> str:
    twice = len(steps) - len(set(steps))
    missing, more = sorted(set(clean) - set(steps)), sorted(set(steps) - set(clean))
    found = [
        *([f"{twice} steps twice"] if twice else []),
        *([f"{len(missing)} steps missing from {missing[0]} on"] if missing else []),
        *([f"{len(more)} steps too many from {more[0]} on"] if more else []),
    ]
    return f"the metrics have {', '.join(found) or 'steps in another order'}"


def _computed(name: str) -> bool:
    return not name.endswith(_TIMES) and not name.startswith(_AT_THEIR_TIME)
