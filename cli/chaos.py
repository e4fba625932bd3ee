"""``dltrain chaos``: faults played against a job, and the verdict."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.config import load_job
from ..core.errors import JobError, Problem
from ..launcher.chaos.faults import parse_faults
from ..models.registry import RECIPES
from .arguments import job_target

if TYPE_CHECKING:
    from ..launcher.chaos.campaign import Clean, Plan, Trial


def play(
    target: Sequence[str], *, faults: str | None, random: int | None, seed: int, schedule: int | None, as_json: bool
) -> int:
    """Play the faults and print the verdict; 0 when every run was identical to the undisturbed one, else 1.

    Raises:
        JobError: the request is wrong.
        RunFailed: the job fails without any fault.
    """
    named = job_target(target)
    if named.problems:
        raise JobError(*named.problems)
    job = load_job(named.job_file, named.overrides, {}, os.environ, recipes=RECIPES).job
    plan = _plan(faults, random, seed, schedule)
    from ..launcher.chaos.campaign import run_campaign

    out = _Lines(silent=as_json)
    clean, trials = run_campaign(job, plan, on_clean=out.clean, on_trial=out.trial)
    same = sum(trial.identical for trial in trials)
    if as_json:
        answer = {
            "job": job.name,
            "ranks": clean.world,
            "steps": clean.steps,
            "seconds": clean.seconds,
            "weights": clean.trace.weights,
            "identical": same,
            "schedules": [trial.to_json() for trial in trials],
        }
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    else:
        sys.stdout.write(f"{same} of {len(trials)} identical to the run that nothing happened to\n")
    return 0 if same == len(trials) else 1


def _plan(faults: str | None, random: int | None, seed: int, schedule: int | None) -> Plan:
    from ..launcher.chaos.campaign import Plan

    if (faults is None) == (random is None and schedule is None):
        what = "cannot stand beside random schedules" if faults is not None else "there are no faults to play"
        raise JobError(Problem(what, "--faults", "give --faults 'kill:rank=0@50', or --random 10"))
    if faults is not None:
        return Plan(parse_faults(faults))
    if random is not None and random < 1:
        raise JobError(Problem(f"{random} schedules are none", "--random", "1 or more"))
    return Plan(seed=seed, numbers=(schedule,) if schedule is not None else tuple(range(1, (random or 0) + 1)))


class _Lines:
    """Prints each run as it ends."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent

    def clean(self, clean: Clean) -> None:
        ranks = f"{clean.world} rank{'s' if clean.world > 1 else ''}"
        text = f"clean run: {clean.steps} steps on {ranks} in {clean.seconds:.1f} s, weights {clean.trace.weights[:12]}"
        self._say(text)

    def trial(self, trial: Trial) -> None:
        done = trial.performance
        self._say(f"schedule {trial.number}: {', '.join(map(str, trial.faults))}")
        back = [f"{one.back:.1f} s" for one in done.played if one.back is not None]
        facts = [
            "identical" if trial.identical else "NOT IDENTICAL",
            f"{done.starts} starts of the ranks",
            f"{done.steps_again} steps done again",
            *([f"a new step after {', '.join(back)}"] if back else []),
            f"{done.seconds:.1f} s in all",
        ]
        self._say(f"  {'; '.join(facts)}")
        for wrong in trial.wrong:
            self._say("    " + wrong.replace("\n", "\n    "))
        if trial.folder:
            self._say(f"    kept in {trial.folder}; its file 'command' says how it was launched")

    def _say(self, text: str) -> None:
        if not self._silent:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
