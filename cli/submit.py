"""``dltrain submit``: a launch handed to a cluster, and followed there."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.config import load_job
from ..core.errors import JobError, Problem, RunFailed
from ..launcher.submit.clusters import find_cluster, read_cluster
from ..launcher.submit.handle import Handle
from ..launcher.submit.jobs import kind_of, output_of, stop_job, submit, wait_for
from ..launcher.submit.steps import Submission
from ..models.registry import RECIPES
from .options import parse_launch

_CODES = {"queued": 0, "running": 0, "finished": 0, "failed": 1, "unknown": 1, "stopped": 3}
_REFUSED = {
    "--address": "the cluster file says where the job goes",
    "--standalone": "a submitted job runs on the cluster",
    "--keep-warm": "the next job finds nothing of this one's",
    "--submission": "dltrain submit writes it itself",
}


@dataclass(frozen=True)
class Wanted:
    """What to do with a job beside handing it over."""

    cluster: str
    wait: bool = False
    follow: bool = False
    dry_run: bool = False


def run(options: Sequence[str], target: Sequence[str], wanted: Wanted) -> int:
    """Hand over a launch of ``target`` with ``options``; 0, or how the job ended if that is waited for.

    Raises:
        JobError: the launch or the cluster file is wrong; nothing was started.
        RunFailed: the cluster has not taken the job.
    """
    adapter = read_cluster(find_cluster(wanted.cluster))
    submission = _submission(options, target)
    if wanted.dry_run:
        sys.stdout.write("".join(f"{line}\n" for line in adapter.render(submission).lines()))
        return 0
    handle = submit(adapter, submission, _say)
    name = f"{handle.name}/{handle.key}"
    where = "" if submission.runs == Path("runs").absolute() else f" --run-dir {submission.runs}"
    _say(f"submitted {name}\n\nnext:")
    for command, what in (("status", "how it stands"), ("logs -f", "what it prints"), ("stop", "save and end")):
        _say(f"  dltrain {command} {name}{where}    # {what}")
    return follow(handle, quiet=not wanted.follow) if wanted.follow or wanted.wait else 0


def _submission(options: Sequence[str], target: Sequence[str]) -> Submission:
    names = [option.partition("=")[0] for option in options]
    problems = [Problem("has no place in dltrain submit", n, _REFUSED[n]) for n in names if n in _REFUSED]
    if problems:
        raise JobError(*problems)
    request = parse_launch([*options, "--address=auto", "--", *target])  # there, it will have one
    is_job = request.kind == "job"
    file = request.job_file if is_job else None
    job = load_job(
        file, request.overrides, request.job_flags(), os.environ, recipes=RECIPES if is_job else (), whole=is_job
    ).job
    return Submission(
        name=job.name if is_job else _script_name(request.kind, request.script),
        options=tuple(o for o, n in zip(options, names, strict=True) if n != "--run-dir"),
        target=tuple(target),
        is_job=is_job,
        resources=job.resources,
        machines=job.resources.nodes + job.recovery.spares,
        stop_grace=job.recovery.stop_grace,
        folder=Path.cwd(),
        runs=request.run_dir.absolute(),
        environ=dict(os.environ),
    )


def _script_name(kind: str, script: str) -> str:
    from ..launcher.api import script_name
    from ..launcher.messages import Target

    return script_name(Target(kind, script))  # pyright: ignore[reportArgumentType]  # not a job, so one of the others


def follow(handle: Handle, *, quiet: bool = False) -> int:
    """Show what a job prints until it is over, or only wait if ``quiet``, and say how it ended; its exit code.

    Ctrl-C ends the watching, and the job only where that lives with its submitter.
    """
    try:
        if not quiet:
            try:
                _show_output(handle)
            except RunFailed as error:
                sys.stderr.write(f"dltrain: {error}: what else the job prints is not shown\n")
        state = wait_for(handle)
    except KeyboardInterrupt:
        if kind_of(handle).ends_with_submitter:
            stop_job(handle, now=False, say=_say)
        else:
            _say(f"{handle.name}/{handle.key} goes on; dltrain stop {handle.name}/{handle.key} ends it")
        return 130
    _say(f"{handle.name}/{handle.key}: {state}")
    return _CODES[state.standing]


def _show_output(handle: Handle) -> None:
    out = sys.stdout.buffer
    for piece in output_of(handle, follow=True):
        out.write(piece)
        out.flush()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
