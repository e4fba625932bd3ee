"""What a job says of failures: ``recovery``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from .spec import Duration, Spec, parse_duration


class RecoverySpec(Spec):
    max_restarts: int = Field(default=0, ge=0)
    """How often the ranks are started again after a failure (from the newest checkpoint)."""
    start_timeout: Duration = 120.0
    """Longest wait for the cluster, the node agents and the fork servers, each."""
    stop_grace: Duration = 30.0
    """Time that ranks get to end after the first Ctrl-C or SIGTERM before they are killed."""
    stall: Duration | Literal["auto", "never"] = "auto"
    """How long a rank may stay in one place of a step before that counts as a failure. 'auto' is ten times the slowest
    step, and two minutes at least, or ten seconds for a process that was stopped (SIGSTOP); 'never' lets ranks hang.
    Scripts are not watched: they do not say where they are."""
    stall_at_start: Duration = 1800.0
    """The same before the third step of a start, and in its first evaluation and checkpoint, which may compile, load
    and allocate. Collectives wait for half an hour at most by themselves."""

    @field_validator("stall", mode="before")
    @classmethod
    def _parse_stall(cls, stall: object) -> object:
        if stall in ("auto", "never"):
            return stall
        try:
            seconds = parse_duration(stall)
        except ValueError as error:
            raise ValueError(f"{error}; or 'auto' or 'never'") from None
        if seconds < 1:
            raise ValueError("ranks are looked at about twice a second: give at least 1 s, or 'never'")
        return seconds
