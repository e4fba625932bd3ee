"""The commands that look at runs and submitted jobs, and end them: ``status``, ``runs``, ``logs``, ``stop``."""

from __future__ import annotations

from typing import Annotated

import typer

_RUN_HELP = (
    "A run's folder, a job's name (its newest run), name/number, or a submitted job as submit names it "
    "(default: what was launched or submitted last)."
)
_Run = Annotated[str | None, typer.Argument(metavar="RUN", help=_RUN_HELP, show_default=False)]
RunsFolder = Annotated[str, typer.Option("--run-dir", metavar="DIR", help="Parent of the run directories.")]
_Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help="Ask this Ray cluster's dashboard, as http://head:8265.", show_default=False
    ),
]
_Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster", metavar="FILE|NAME", help="Ask the cluster of this file of dltrain submit.", show_default=False
    ),
]


def status(
    run: _Run = None,
    run_dir: RunsFolder = "runs",
    address: _Address = None,
    cluster: _Cluster = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print how a run stands: state, step, ranks, loss, restarts, goodput.

    Exit code: 0 running or finished, 1 failed or died, 2 no such run, 3 stopped.
    """
    from .runs import Where, show_status

    raise typer.Exit(show_status(run, Where.of(run_dir, address, cluster), as_json=as_json))


def runs(
    run_dir: RunsFolder = "runs",
    address: _Address = None,
    cluster: _Cluster = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs, and the submitted jobs that have none yet, the newest first; or the jobs of a cluster."""
    from .runs import Where, show_runs

    raise typer.Exit(show_runs(Where.of(run_dir, address, cluster), as_json=as_json))


def logs(
    run: _Run = None,
    run_dir: RunsFolder = "runs",
    address: _Address = None,
    cluster: _Cluster = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends, over restarts.")] = False,
    rank: Annotated[list[int] | None, typer.Option("--rank", metavar="N", help="This rank only; repeatable.")] = None,
    node: Annotated[list[int] | None, typer.Option("--node", metavar="N", help="This node only; repeatable.")] = None,
    generation: Annotated[
        list[int] | None, typer.Option("--generation", metavar="N", help="This start of the ranks only; repeatable.")
    ] = None,
) -> None:
    """Print what a run's ranks printed, of every start of the ranks; or what a submitted job printed."""
    from ..launcher.logs import Pick
    from .runs import Where, show_logs

    pick = Pick(rank or None, node or None, generation or None)
    raise typer.Exit(show_logs(run, Where.of(run_dir, address, cluster), pick=pick, follow=follow))


def stop(
    run: _Run = None,
    run_dir: RunsFolder = "runs",
    address: _Address = None,
    cluster: _Cluster = None,
    now: Annotated[bool, typer.Option("--now", help="At once, without a last checkpoint.")] = False,
) -> None:
    """Stop a run of this machine or a submitted job as Ctrl-C does: it saves a checkpoint, and can go on from there."""
    from .runs import Where, ask_to_stop

    raise typer.Exit(ask_to_stop(run, Where.of(run_dir, address, cluster), now=now))


def add_runs(app: typer.Typer) -> None:
    """Put the commands into ``app``."""
    for command in (status, runs, logs, stop):
        app.command(command.__name__)(command)
