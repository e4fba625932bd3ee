"""The ``dltrain`` command: parse, call one function below, render.

    dltrain launch --nodes 2
    dltrain config show train.epochs=3

Nothing heavy is imported before a command needs it: ``--help`` takes a tenth of a second.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..core.errors import DltrainError, JobError, Problem
from .arguments import classify
from .checkpoint import checkpoint
from .cluster import cluster
from .options import add_launch
from .render import exit_code, render_error
from .runs_command import RunsFolder, add_runs
from .submit_command import add_submit

_JOB_HELP = "A job file (default ./dltrain.yaml, else the built-in job) and key.path=value overrides."

_FAULTS_HELP = "What happens, to whom, when: 'kill:rank=1@step=50, stop:rank=0@120, driver@12.5s'."
app = typer.Typer(
    name="dltrain",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
config = typer.Typer(no_args_is_help=True, help="Show, describe and start job files.")
data = typer.Typer(no_args_is_help=True, help="Look at a job's data, and prepare text.")
add_launch(app)
add_submit(app)
add_runs(app)
app.add_typer(config, name="config")
app.add_typer(data, name="data")
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(cluster, name="cluster")


def main() -> None:
    """Run the command line; every error that dltrain raises on purpose ends in a message and its exit code."""
    _open_closed_streams()
    command = typer.main.get_command(app)
    try:
        _check_command(sys.argv[1:], getattr(command, "commands", {}))
        command.main(prog_name="dltrain")
    except DltrainError as error:
        render_error(error)
        sys.exit(exit_code(error))


def _open_closed_streams() -> None:
    """Have standard streams that the caller has closed lead nowhere; else the next file would take their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free, which is the stream's
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(null, mode, encoding="utf-8"))


def _check_command(argv: list[str], commands: dict[str, object]) -> None:
    first = argv[0] if argv else ""
    if first and first not in commands and not first.startswith("-") and classify(first) != "unknown":
        raise JobError(Problem(f"'{first}' is no command", hint=f"did you mean: dltrain launch {first}"))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dltrain {__version__}")
        raise typer.Exit


@app.callback()
def dltrain(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Launch distributed PyTorch training on Ray: one command from the laptop to the cluster."""


@config.command("show")
def show(
    target: Annotated[list[str] | None, typer.Argument(metavar="TARGET", help=_JOB_HELP, show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the job, and the origin of each value.")] = False,
) -> None:
    """Print the resolved job, with the place that each value comes from."""
    from .config import show_job

    show_job(target or [], as_json=as_json)


@config.command("schema")
def schema() -> None:
    """Print the JSON schema of job files, for editors."""
    from .config import print_schema

    print_schema()


@config.command("init")
def init(
    path: Annotated[str, typer.Argument(metavar="PATH", help="File to write.")] = "dltrain.yaml",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented starter job file."""
    from pathlib import Path

    from .config import init_job

    init_job(Path(path), force=force)


@config.command("import", no_args_is_help=True)
def import_config(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE…",
            help="Accelerate's default_config.yaml, DeepSpeed's JSON and hostfile; or, after --, a command line of "
            "accelerate launch or deepspeed.",
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="PATH", help="File to write (default: print it).", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    r"""Turn what Accelerate or DeepSpeed is told into a job file, and into the command that runs your script.

    dltrain config import default_config.yaml -o job.yaml

    dltrain config import hostfile ds_config.json -o job.yaml

    dltrain config import -- deepspeed --num_gpus 2 train.py --deepspeed_config ds_config.json
    """
    from pathlib import Path

    from .config_import import import_peer_files

    import_peer_files(words, None if output is None else Path(output), force=force)


@data.command("show")
def show_data(
    target: Annotated[list[str] | None, typer.Argument(metavar="TARGET", help=_JOB_HELP, show_default=False)] = None,
) -> None:
    """Open a job's data and print its samples, parts, shapes and classes."""
    from .data import show_data

    show_data(target or [])


@data.command("prepare")
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Text or JSONL files, plain or gzip, or folders; paths or URLs."),
    ],
    out: Annotated[str, typer.Option("--out", metavar="PATH", help="The token file to write, ending in .tokens.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer",
            metavar="bytes|bpe|PATH",
            help="UTF-8 bytes; a byte-level BPE trained on the input; or a tokenizer.json.",
        ),
    ] = "bytes",
    vocabulary: Annotated[
        int | None, typer.Option("--vocab", metavar="N", help="How many tokens the BPE learns.", show_default=False)
    ] = None,
    field: Annotated[
        str, typer.Option("--field", metavar="NAME", help="The field of a JSONL line that holds its text.")
    ] = "text",
    pattern: Annotated[
        str | None,
        typer.Option(
            "--glob",
            metavar="PATTERN",
            help="Which files of a folder are taken, as '*.py' (default: .txt and .jsonl, plain or .gz).",
            show_default=False,
        ),
    ] = None,
    end_token: Annotated[
        str | None,
        typer.Option(
            "--end-token",
            metavar="TOKEN",
            help="The token of a tokenizer.json that ends documents (default: a usual one, if it is there).",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Tokenize text once, into one file that training maps into memory."""
    from .data import prepare_data

    prepare_data(
        inputs,
        out,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        field=field,
        pattern=pattern,
        end_token=end_token,
        force=force,
    )


@app.command("chaos")
def chaos(
    target: Annotated[list[str] | None, typer.Argument(metavar="TARGET", help=_JOB_HELP, show_default=False)] = None,
    faults: Annotated[
        str | None,
        typer.Option("--faults", metavar="LIST", help=_FAULTS_HELP, show_default=False),
    ] = None,
    random: Annotated[
        int | None, typer.Option("--random", metavar="N", help="Play random schedules 1 to N.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Which random schedules.")] = 0,
    schedule: Annotated[
        int | None,
        typer.Option("--schedule", metavar="K", help="Play random schedule K alone.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, at the end.")] = False,
) -> None:
    """Play faults against a job on this machine, and compare each run with an undisturbed one to the bit.

    Exit code: 0 all are identical, 1 one is not, 2 wrong request.
    """
    from .chaos import play

    raise typer.Exit(play(target or [], faults=faults, random=random, seed=seed, schedule=schedule, as_json=as_json))


@app.command("plan")
def plan(
    target: Annotated[list[str] | None, typer.Argument(metavar="TARGET", help=_JOB_HELP, show_default=False)] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", metavar="N", help="Machines (default: the job's resources.nodes).", show_default=False),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option("--gpus-per-node", metavar="N", help="Ranks on each (default with --gpu: 8).", show_default=False),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", help="H100-80GB, A100-40GB, …; cpu-24GB is a machine without.", show_default=False
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Memory of each rank, as 80GiB.", show_default=False),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            metavar="NAME",
            help="The job's parallel.strategy; with auto what the job says beside it holds.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Look at tensor groups and pipelines where simpler ways fit, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print which strategies a job fits with, in how much memory and time, on machines that need not be there.

    Exit code: 0 one fits, 1 none does, 2 wrong request.
    """
    from .plan import show_plan

    raise typer.Exit(
        show_plan(
            target or [],
            nodes=nodes,
            per_node=gpus_per_node,
            gpu=gpu,
            memory=memory,
            strategy=strategy,
            everything=everything,
            as_json=as_json,
        )
    )


@app.command("doctor")
def doctor(
    target: Annotated[list[str] | None, typer.Argument(metavar="TARGET", help=_JOB_HELP, show_default=False)] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address", metavar="HOST:PORT|auto", help="A Ray cluster (default: this machine).", show_default=False
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes", metavar="N", min=1, help="Nodes to look at (default: all machines).", show_default=False
        ),
    ] = None,
    run_dir: RunsFolder = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")] = False,
) -> None:
    """Look at every node, and measure what joins them, before a job depends on it.

    Exit code: 0 healthy, 1 a node is sick or could not be had, 2 no such cluster.
    """
    from pathlib import Path

    from .doctor import show_health

    raise typer.Exit(
        show_health(target or [], address=address, nodes=nodes, runs=Path(run_dir), as_json=as_json, quiet=quiet)
    )
