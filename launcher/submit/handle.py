"""The handle of a submitted job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Handle:
    """What finds a job again: written beside its runs when it is handed over.

    Attributes:
        kind: of the cluster.
        id: what the cluster calls the job.
        name: of the job, and of its runs.
        cluster: where to ask, in the kind's own terms; no secrets.
        submitted: Unix time in seconds.
        runs: parent of its run directories, as the cluster's machines see it.
        stop_grace: seconds that its ranks get to end.
    """

    kind: str
    id: str
    name: str
    cluster: dict[str, Any] = field(default_factory=dict[str, Any])
    submitted: float = 0.0
    runs: str = ""
    stop_grace: float = 0.0

    @property
    def key(self) -> str:
        """By what a run's record and the handle's file name it."""
        return f"{self.kind}-{self.id}"
