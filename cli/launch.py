"""``dltrain launch``: from the parsed request to a call of the launcher, and its result to the terminal."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from ..core.config import load_job
from ..models.registry import RECIPES
from .arguments import LaunchRequest

if TYPE_CHECKING:
    from ..launcher.session import Options
    from ..launcher.view import OutputRules


def run(request: LaunchRequest) -> int:
    """Launch what was asked for and print the summary; the exit code.

    Raises: what :func:`dltrain.launch` raises.
    """
    began = time.time()
    if not request.quiet:
        for note in request.notes:
            print(f"dltrain: {note}", file=sys.stderr, flush=True)  # noqa: T201  # a command speaks to its user
    return _run_job(request, began) if request.kind == "job" else _run_script(request)


def _run_job(request: LaunchRequest, began: float) -> int:
    job = load_job(request.job_file, request.overrides, request.job_flags(), os.environ, recipes=RECIPES).job
    from ..launcher.api import launch

    result = launch(job, options=_options(request), began=began)
    if not request.quiet:
        from .summary import print_summary

        print_summary(job, result)
    return 0


def _run_script(request: LaunchRequest) -> int:
    # the built-in job's sections carry what options and environment say of resources, recovery and tracking, checked
    job = load_job(None, (), request.job_flags(), os.environ, whole=False).job
    from ..launcher.api import launch_script
    from ..launcher.messages import Target

    assert request.kind != "job"
    launch_script(
        Target(request.kind, request.script, request.script_args),
        resources=job.resources,
        recovery=job.recovery,
        tracking=job.tracking,
        options=_options(request),
        rules=_rules(request),
        logs=request.log_dir,
        role=request.role or "default",
        run_id=request.rdzv_id,
    )
    return 0


def _options(request: LaunchRequest) -> Options:
    from ..launcher.session import Options

    return Options(
        address=request.address,
        runs=request.run_dir,
        resume=request.resume,
        init_from=request.init_from,
        keep_warm=request.keep_warm,
        fresh=request.start_method == "spawn",
        quiet=request.quiet,
        preflight=request.preflight,
        master_addr=request.master_addr,
        master_port=request.master_port or 0,
        submission=request.submission,
        job_words=request.job_words(),
    )


def _rules(request: LaunchRequest) -> OutputRules:
    from ..launcher.view import OutputRules

    return OutputRules(
        role=request.role or "default",
        redirects=request.redirects or 0,
        tee=request.tee or 0,
        local_ranks=request.local_ranks_filter,
    )
