"""``dltrain cluster``: example files of clusters, and whether one's own is right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

cluster = typer.Typer(no_args_is_help=True, help="Describe clusters for dltrain submit.")


@cluster.command("init")
def init(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="ray, slurm, ssh, kuberay, aws, gcp, azure, on-premise.")],
    path: Annotated[str | None, typer.Argument(metavar="PATH", help="File to write.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented example file of a kind of cluster, to be edited."""
    from ..launcher.submit.clusters import TEMPLATES, template
    from .starter import write_starter

    text = template(kind)
    target = Path(path or TEMPLATES[kind])
    write_starter(target, text, name=TEMPLATES[kind], force=force)
    sys.stdout.write(
        f"wrote {target}\n\nnext, when it says what is true of yours:\n"
        f"  dltrain cluster check {target}\n  dltrain submit --cluster {target} --dry-run\n"
    )


@cluster.command("check")
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A cluster file, or its name as --cluster takes it.")],
) -> None:
    """Check a cluster file against what its kind of cluster allows; nothing is started."""
    from ..launcher.submit.clusters import find_cluster, read_cluster

    path = find_cluster(file)
    said = read_cluster(path).check()
    sys.stdout.write(f"{path}: " + "\n  ".join(said) + "\n")
