"""Try a job's code in a forked child before any rank starts: its recipe, its model's arguments, its data."""

from __future__ import annotations

from typing import Any

from ..core.errors import JobError, Problem
from .errand import send
from .host import ForkServer
from .messages import ChildSpec


def check_job(
    server: ForkServer, job: dict[str, Any], *, environ: dict[str, str], cwd: str, timeout: float
) -> list[Problem]:
    """The problems that running the job's own code shows. ``server`` must have answered hello.

    Raises:
        JobError: the job's code ended the process, or took longer than ``timeout`` seconds.
    """
    env = {**environ, "OMP_NUM_THREADS": "1"}
    spec = ChildSpec(kind="check", label="dltrain-check", env=env, cwd=cwd, threads=1, body={"job": job})
    outcome = send(server, spec, timeout)
    if outcome.exit is None:
        what = f"building the recipe and opening the data took longer than {timeout:g} s"
        raise JobError(Problem(what, "recovery.start_timeout", "give it more time"))
    if not outcome.messages:
        raise JobError(Problem(f"building the recipe or opening the data {outcome}\n{outcome.output}", "recipe"))
    return [Problem(**problem) for problem in outcome.messages[0]["problems"]]
