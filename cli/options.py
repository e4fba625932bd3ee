"""The option surface of ``dltrain launch``: names, help, panels. What the values mean is in ``translate.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .arguments import LaunchRequest, build_request, split

_CLUSTER, _RUN, _TORCHRUN = "Cluster", "Run", "torchrun compatible"

_EPILOG = (
    "Options take - and _ alike. torchrun's --rdzv-backend, --rdzv-endpoint, --rdzv-conf, --monitor-interval, "
    "--local-addr, --numa-binding and --run-path are accepted and change nothing."
)

Text = str | None


class LaunchCommand(TyperCommand):
    """A command whose target ends its own options: see ``arguments.py``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options, target = split(args, spellings(self.get_params(ctx)))
        return super().parse_args(ctx, [*options, "--", *target])


def spellings(params: Sequence[Any]) -> dict[str, bool]:
    """Every spelling of every option, and whether a value follows it."""
    return {name: not param.is_flag for param in params if param.param_type_name == "option" for name in param.opts}


def _option(panel: str, *names: str, metavar: str | None = None, help: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel, show_default=False)


def _accepted(name: str) -> Any:
    """An option of torchrun's that changes nothing; the help names it in one line with its like."""
    return typer.Option(name, hidden=True)


def launch(
    ctx: typer.Context,
    target: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET",
            show_default=False,
            help="A job file with key.path=value overrides, or a script with its own arguments.",
        ),
    ] = None,
    nodes: Annotated[
        Text,
        _option(
            _CLUSTER,
            "--nodes",
            "--nnodes",
            metavar="N|MIN:MAX",
            help="Nodes to spread over (default 1); MIN:MAX goes on with fewer when some are lost.",
        ),
    ] = None,
    nproc_per_node: Annotated[
        Text,
        _option(
            _CLUSTER,
            "--nproc-per-node",
            metavar="N|auto|cpu|gpu",
            help="Ranks per node: a number, one per GPU, one per core, or auto (per GPU, else one; the default).",
        ),
    ] = None,
    address: Annotated[
        Text,
        _option(
            _CLUSTER,
            "--address",
            metavar="HOST:PORT|auto",
            help="Join this Ray cluster instead of starting an embedded one.",
        ),
    ] = None,
    network_interface: Annotated[
        Text,
        _option(_CLUSTER, "--network-interface", metavar="NAME", help="Interface that ranks talk over, such as eth0."),
    ] = None,
    placement: Annotated[
        Text,
        _option(
            _CLUSTER,
            "--placement",
            metavar="auto|spread|pack",
            help="spread: every node on a machine of its own; pack: nodes may share machines; "
            "auto: spread on a cluster, pack on the embedded one.",
        ),
    ] = None,
    keep_warm: Annotated[
        Text,
        _option(
            _CLUSTER,
            "--keep-warm",
            metavar="DURATION",
            help="Leave the fork servers of the joined cluster for the next launch this long, as 10min (default 0).",
        ),
    ] = None,
    strategy: Annotated[
        Text,
        _option(
            _RUN,
            "--strategy",
            metavar="NAME|auto",
            help="How a job's model lies on its ranks: ddp (the default), fsdp, zero1, zero2, zero3; "
            "auto takes the first choice of dltrain plan for the nodes that there are.",
        ),
    ] = None,
    run_dir: Annotated[
        Text, _option(_RUN, "--run-dir", metavar="DIR", help="Parent of the run directories (default ./runs).")
    ] = None,
    resume: Annotated[
        Text,
        _option(
            _RUN,
            "--resume",
            metavar="auto|never|PATH",
            help="Go on with the unfinished run of this job (auto, the default), start afresh, or go on from a folder.",
        ),
    ] = None,
    init_from: Annotated[
        Text,
        _option(
            _RUN,
            "--init-from",
            metavar="PATH",
            help="Begin a new run with the weights of another's newest checkpoint, and nothing else of it.",
        ),
    ] = None,
    max_restarts: Annotated[
        Text,
        _option(
            _RUN,
            "--max-restarts",
            metavar="N|auto",
            help="Start the ranks again up to N times after a failure. auto, the default: after what came from outside "
            "as often as it takes, after what the program did never; for a script it is 0.",
        ),
    ] = None,
    start_method: Annotated[
        Text,
        _option(
            _RUN,
            "--start-method",
            metavar="fork|spawn",
            help="fork: from a server that has torch imported (the default); spawn: a fresh interpreter per rank.",
        ),
    ] = None,
    preflight: Annotated[
        bool, _option(_CLUSTER, "--preflight", help="Look at the nodes first (dltrain doctor), and refuse sick ones.")
    ] = False,
    submission: Annotated[Text, typer.Option("--submission", hidden=True)] = None,
    quiet: Annotated[bool, _option(_RUN, "--quiet", "-q", help="No progress display.")] = False,
    module: Annotated[
        bool, _option(_TORCHRUN, "--module", "-m", help="The target is a module, run as python -m does.")
    ] = False,
    no_python: Annotated[
        bool, _option(_TORCHRUN, "--no-python", help="The target is a program, run directly.")
    ] = False,
    run_path: Annotated[bool, _accepted("--run-path")] = False,
    log_dir: Annotated[Text, _option(_TORCHRUN, "--log-dir", metavar="DIR", help="Folder for the ranks' logs.")] = None,
    redirects: Annotated[
        Text,
        _option(
            _TORCHRUN,
            "--redirects",
            "-r",
            metavar="STREAMS",
            help="Streams that go to log files only: 1 stdout, 2 stderr, 3 both; or by local rank, as 0:3,1:1.",
        ),
    ] = None,
    tee: Annotated[
        Text,
        _option(
            _TORCHRUN,
            "--tee",
            "-t",
            metavar="STREAMS",
            help="Streams that go to log files and to the console, likewise.",
        ),
    ] = None,
    local_ranks_filter: Annotated[
        Text,
        _option(
            _TORCHRUN,
            "--local-ranks-filter",
            metavar="RANKS",
            help="Show the output of these local ranks only, as 0,1.",
        ),
    ] = None,
    role: Annotated[
        Text, _option(_TORCHRUN, "--role", metavar="NAME", help="Role of the ranks, for the script.")
    ] = None,
    rdzv_id: Annotated[
        Text, _option(_TORCHRUN, "--rdzv-id", metavar="ID", help="Id of the run, for the script.")
    ] = None,
    master_addr: Annotated[
        Text, _option(_TORCHRUN, "--master-addr", metavar="HOST", help="Host of the ranks' rendezvous store.")
    ] = None,
    master_port: Annotated[
        Text,
        _option(_TORCHRUN, "--master-port", metavar="PORT", help="Port of the rendezvous store (default: a free one)."),
    ] = None,
    standalone: Annotated[
        bool, _option(_TORCHRUN, "--standalone", help="Start an embedded cluster, whatever the environment says.")
    ] = False,
    node_rank: Annotated[
        Text, _option(_TORCHRUN, "--node-rank", metavar="0", help="Only 0: one launch starts all nodes.")
    ] = None,
    rdzv_backend: Annotated[Text, _accepted("--rdzv-backend")] = None,
    rdzv_endpoint: Annotated[Text, _accepted("--rdzv-endpoint")] = None,
    rdzv_conf: Annotated[Text, _accepted("--rdzv-conf")] = None,
    monitor_interval: Annotated[Text, _accepted("--monitor-interval")] = None,
    local_addr: Annotated[Text, _accepted("--local-addr")] = None,
    numa_binding: Annotated[Text, _accepted("--numa-binding")] = None,
) -> None:
    r"""Train: a job file, or any torchrun-compatible script, on as many nodes as you like.

    dltrain launch \[job.yaml] \[key.path=value …] \[options]

    dltrain launch \[options] train.py args…    (or: -m pkg.module args…, --no-python program args…)

    Without a job file it is ./dltrain.yaml if there, else the built-in digits job.
    """
    from .launch import run

    raise typer.Exit(run(build_request(ctx.params)))


def parse_launch(argv: Sequence[str]) -> LaunchRequest:
    """The request of what follows ``dltrain launch`` on a command line; nothing is launched.

    Raises:
        JobError: with every problem found.
    """
    return build_request(_command().make_context("launch", list(argv)).params)


def option_spellings() -> dict[str, bool]:
    """Every spelling of every option of ``dltrain launch``, and whether a value follows it."""
    command = _command()
    return spellings(command.get_params(command.make_context("launch", [])))


def add_launch(app: typer.Typer) -> None:
    """Put the command into ``app``."""
    settings = {"help_option_names": ["--help", "-h"]}
    app.command("launch", cls=LaunchCommand, context_settings=settings, epilog=_EPILOG)(launch)


def _command() -> Any:
    app = typer.Typer(add_completion=False)
    add_launch(app)
    return typer.main.get_command(app)
