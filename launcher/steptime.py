"""How long a step takes, from what one rank computes and sends: a model for ranking, not a promise. Pure functions.

Operations take as long as their arithmetic or their memory traffic, whichever is longer (Williams et al. 2009,
"Roofline"), at the shares of the peaks that are given here. Collectives take the bytes that a rank sends in a ring over
what its node's links or its share of the network carry. Those of the data-parallel ranks hide behind computation, in
part. A pipeline waits for its first and last microbatches (Narayanan et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.gpus import Gpu
from ..core.parallel import Parallel

MATRIX = 0.65  # of a GPU's arithmetic, that large matrices get
TRAFFIC = 0.8  # of its memory's rate, that simple operations get
WIRE = 0.8  # of a link's rate
LAUNCH = 5e-6  # seconds that torch takes for an operation, however small
HIDDEN = 0.7  # of computation, behind which gradients and gathered weights can be sent
_NEAR, _FAR = 5e-6, 15e-6  # seconds for a message to pass one rank of a node, one of another


@dataclass(frozen=True)
class Sent:
    """What a rank sends in a step by collectives of one kind.

    Attributes:
        kind: "reduce", "scatter", "gather" or "point".
        ranks: ranks that take part.
        nodes: nodes that they are on.
        size: bytes that this rank sends.
        messages: how many collectives.
    """

    kind: str
    ranks: int
    nodes: int
    size: float
    messages: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are spent for: they add up."""

    computing: float
    sending: float
    waiting: float

    @property
    def total(self) -> float:
        return self.computing + self.sending + self.waiting


def step_time(computing: float, sent: Sequence[Sent], gpu: Gpu, parallel: Parallel, *, microbatches: int) -> StepTime:
    """The time of a step.

    Args:
        computing: seconds of a rank's own operations.
        microbatches: of one step on one data-parallel rank.
    """
    open_, hideable = 0.0, 0.0
    for item in sent:
        seconds = _seconds(item, gpu)
        if item.kind == "point" or item.ranks == parallel.tensor:  # what comes next waits for it
            open_ += seconds
        else:
            hideable += seconds
    sending = open_ + max(hideable - HIDDEN * computing, 0.05 * hideable)
    stages = parallel.pipeline
    chunks = parallel.stages // stages
    waiting = (computing + open_) * (stages - 1) / (microbatches * chunks) if stages > 1 else 0.0
    return StepTime(computing, sending, waiting)


def _seconds(item: Sent, gpu: Gpu) -> float:
    if item.ranks < 2:
        return 0.0
    rate = gpu.link if item.nodes == 1 else min(gpu.link, gpu.network * item.ranks / item.nodes)
    hop = _NEAR if item.nodes == 1 else _FAR
    return item.size / (rate * WIRE) + item.messages * hop * math.log2(item.ranks)
