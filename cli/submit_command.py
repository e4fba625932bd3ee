"""The option surface of ``dltrain submit``: its own options, and all of ``dltrain launch``'s."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .arguments import split
from .options import option_spellings, spellings

_LAUNCH = "dltrain.launch"


class SubmitCommand(TyperCommand):
    """A command that keeps the options of ``dltrain launch``, and the target, as they were typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = spellings(self.get_params(ctx))
        options, target = split(args, option_spellings() | own)
        ctx.meta[_LAUNCH] = [option for option in options if option.partition("=")[0] not in own], target
        return super().parse_args(ctx, [option for option in options if option.partition("=")[0] in own])


def submit(
    ctx: typer.Context,
    cluster: Annotated[
        str,
        typer.Option(
            "--cluster", metavar="FILE|NAME", help="The cluster: a file of dltrain cluster init, or its name."
        ),
    ],
    wait: Annotated[bool, typer.Option("--wait", help="Return when the job has ended, with its exit code.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Likewise, and show meanwhile what the job prints.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print every command, file and variable's name, and start nothing."),
    ] = False,
) -> None:
    r"""Hand a launch to a cluster and return.

    dltrain submit \[job.yaml] \[key.path=value …] --cluster FILE \[options of dltrain launch]

    dltrain submit --cluster FILE \[options of dltrain launch] train.py args…
    """
    from .submit import Wanted, run

    options, target = ctx.meta[_LAUNCH]
    raise typer.Exit(run(options, target, Wanted(cluster, wait=wait, follow=follow, dry_run=dry_run)))


def add_submit(app: typer.Typer) -> None:
    """Put the command into ``app``."""
    app.command("submit", cls=SubmitCommand, context_settings={"help_option_names": ["--help", "-h"]})(submit)
