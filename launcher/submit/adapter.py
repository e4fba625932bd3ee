"""What every kind of cluster can be asked: whether its file is right, to take a job, and how that job stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeVar

from pydantic import ValidationError

from ...core.document import Document
from ...core.errors import JobError, Problem
from ...core.schema import explain
from ...core.spec import Spec
from .handle import Handle
from .steps import Steps, Submission

Standing = Literal["queued", "running", "finished", "stopped", "failed", "unknown"]

#: Of these nothing more is to come.
OVER: frozenset[Standing] = frozenset({"finished", "stopped", "failed", "unknown"})

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class JobState:
    """How a job stands in its cluster's eyes, with the cluster's own words for it."""

    standing: Standing
    words: str = ""

    def __str__(self) -> str:
        return self.standing + (f" ({self.words})" if self.words else "")


class Adapter(ABC):
    """A cluster of one kind. :meth:`render` decides what is done, and the others do it."""

    kind: ClassVar[str]
    ends_with_submitter: ClassVar[bool] = False
    """Whether Ctrl-C while it is followed ends a job, which else goes on without the one who watches."""

    @classmethod
    @abstractmethod
    def read(cls, path: Path, document: Document) -> Self:
        """The cluster of a file; raises JobError with everything that is wrong in it."""

    @abstractmethod
    def check(self) -> list[str]:
        """What a file says, and what else was found in order, a sentence each; raises JobError where it is not."""

    @abstractmethod
    def render(self, submission: Submission) -> Steps:
        """What handing over the job would come to; raises JobError where the cluster cannot take it."""

    @abstractmethod
    def hand_over(self, submission: Submission, say: Callable[[str], None]) -> Handle:
        """Give the job to the cluster, and return at once; raises RunFailed where it is not taken."""

    @abstractmethod
    def jobs(self) -> list[tuple[Handle, JobState]]:
        """The jobs of dltrain that the cluster knows, and how each stands; raises RunFailed where nobody answers."""

    @staticmethod
    @abstractmethod
    def state(handle: Handle) -> JobState:
        """How the job stands now; raises RunFailed where nobody answers."""

    @staticmethod
    @abstractmethod
    def output(handle: Handle, *, follow: bool) -> Iterator[bytes]:
        """What the job's driver has printed; followed, all that comes until its end."""

    @staticmethod
    @abstractmethod
    def stop(handle: Handle, *, now: bool) -> None:
        """Ask the job to end, ``now`` without a last checkpoint; it has not ended yet when this returns."""


def checked(model: type[S], document: Document, path: Path) -> S:
    """The file's values as ``model``.

    Raises:
        JobError: with everything that does not fit it.
    """
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        problems = [
            Problem(problem.what, place(document, path, key), problem.hint)
            for key, problem in explain(error, model, document.value)
        ]
        raise JobError(*problems) from None


def place(document: Document, path: Path, key: Sequence[str]) -> str:
    """File, line and key of what the file says at ``key``, or would say there."""
    whole = tuple(key)
    line = next((document.lines[whole[:n]] for n in range(len(whole), 0, -1) if whole[:n] in document.lines), None)
    return ": ".join(filter(None, [f"{path}:{line}" if line else str(path), ".".join(whole)]))
