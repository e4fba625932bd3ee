"""What handing a job to a cluster comes to, before anything is done: files, commands, and names of variables."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.config import ENV_PREFIX
from ...core.job import Resources
from .handle import Handle


@dataclass(frozen=True)
class Submission:
    """A launch to be carried out elsewhere.

    Attributes:
        name: of its runs: the job's, or the script's.
        options: of ``dltrain launch``, each a word or ``--name=value``, without those that the cluster decides.
        target: the job file and overrides, or the script and its arguments.
        is_job: whether the target is a job, which can go on from a checkpoint.
        resources: nodes and ranks.
        machines: how many there have to be, those that wait as spares among them.
        stop_grace: seconds that ranks get to end.
        folder: the working directory.
        runs: parent of the run directories here.
        environ: the environment.
    """

    name: str
    options: tuple[str, ...]
    target: tuple[str, ...]
    is_job: bool
    resources: Resources
    machines: int
    stop_grace: float
    folder: Path
    runs: Path
    environ: Mapping[str, str]

    @property
    def words(self) -> tuple[str, ...]:
        """The target as it follows the options."""
        return self.target if self.is_job else ("--", *self.target)

    def handle(self, kind: str, id: str, cluster: dict[str, Any], *, runs: str = "") -> Handle:
        """The handle of the job that a cluster has taken; ``runs`` is where its runs are, if not here."""
        return Handle(kind, id, self.name, cluster, time.time(), runs or str(self.runs), self.stop_grace)

    def job_variables(self) -> tuple[str, ...]:
        """Names of the variables that are keys of the job."""
        return tuple(sorted(name for name in self.environ if name.startswith(ENV_PREFIX)))


@dataclass(frozen=True)
class Steps:
    """What will be done, as ``--dry-run`` prints it.

    Attributes:
        commands: as a shell would be told; some only stand for a call of a library.
        files: text by name, of those that are written or sent.
        notes: what else there is to know, a sentence each.
        environment: names of the variables that travel; their values are shown nowhere.
    """

    commands: tuple[str, ...]
    files: Mapping[str, str]
    notes: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The steps as text."""
        out: list[str] = []
        for name, text in self.files.items():
            out += [f"--- file {name}", *text.splitlines(), "---"]
        out += [f"$ {command}" for command in self.commands]
        out += ["environment: " + (", ".join(self.environment) or "nothing")]
        return out + list(self.notes)


def on_path() -> str:
    """A shell line that puts this process's environment on the path."""
    return f"export PATH={shlex.quote(str(Path(sys.executable).parent))}{os.pathsep}$PATH"
