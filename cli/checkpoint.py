"""``dltrain checkpoint``: what its commands are called and take. What they do is in :mod:`.checkpoints`."""

from __future__ import annotations

from typing import Annotated

import typer

_SOURCE_HELP = "A run directory, a folder or URL of checkpoints, or one step-* folder."
_Source = Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE_HELP)]
_Step = Annotated[
    int | None, typer.Option("--step", metavar="N", help="Which checkpoint (default: the newest).", show_default=False)
]
_Match = Annotated[
    list[str] | None,
    typer.Option("--match", metavar="PATTERN", help="Only tensors named like this, as 'model.*.bias'; repeatable."),
]
_Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="A storage option of a URL, as fsspec takes it; repeatable."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

checkpoint = typer.Typer(no_args_is_help=True, help="Look at checkpoints, check, compare, convert and clear them.")


@checkpoint.command("ls")
def ls(source: _Source, option: _Option = None, as_json: _Json = False) -> None:
    """List the checkpoints: step, time, size, who wrote them, and whether they are complete."""
    from .checkpoints import list_checkpoints
    from .storage_options import parse_options

    list_checkpoints(source, parse_options(option or [], [source]), as_json=as_json)


@checkpoint.command("show")
def show(
    source: _Source, step: _Step = None, match: _Match = None, option: _Option = None, as_json: _Json = False
) -> None:
    """Print what a checkpoint holds: the job, the position in it, and every tensor."""
    from .checkpoints import show_checkpoint
    from .storage_options import parse_options

    show_checkpoint(source, step, match or [], parse_options(option or [], [source]), as_json=as_json)


@checkpoint.command("verify")
def verify(
    source: _Source,
    step: _Step = None,
    every: Annotated[bool, typer.Option("--all", help="Every complete checkpoint, not only one.")] = False,
    option: _Option = None,
) -> None:
    """Read every byte of a checkpoint and compare its hashes; exits with 1 if anything is wrong."""
    from .checkpoints import verify_checkpoints
    from .storage_options import parse_options

    raise typer.Exit(verify_checkpoints(source, step, parse_options(option or [], [source]), every=every))


@checkpoint.command("diff")
def diff(
    one: Annotated[str, typer.Argument(metavar="A", help=_SOURCE_HELP)],
    other: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    step: _Step = None,
    match: _Match = None,
    option: _Option = None,
    as_json: _Json = False,
) -> None:
    """Tell which tensors of two checkpoints differ, and by how much; exits with 1 if any do."""
    from .checkpoints import diff_checkpoints
    from .storage_options import parse_options

    raise typer.Exit(
        diff_checkpoints(one, other, step, match or [], parse_options(option or [], [one, other]), as_json=as_json)
    )


@checkpoint.command("convert")
def convert(
    source: _Source,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A folder, or a file ending in .safetensors; or a URL.")
    ],
    step: _Step = None,
    part: Annotated[
        str | None, typer.Option("--part", metavar="NAME", help="Only this part of the recipe, as a GAN's generator.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights instead of the trained ones.")] = False,
    shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", metavar="SIZE", help="Bytes of one file of a folder (default 5GB)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    option: _Option = None,
) -> None:
    """Write a checkpoint's weights as plain safetensors, with a config.json beside them."""
    from .checkpoints import convert_checkpoint
    from .storage_options import parse_options

    options = parse_options(option or [], [source, target])
    convert_checkpoint(source, target, step, options, part=part, ema=ema, shard_size=shard_size, force=force)


@checkpoint.command("gc")
def gc(
    source: _Source,
    keep: Annotated[
        int | None,
        typer.Option(
            "--keep", metavar="N", min=1, help="Also remove complete ones but the newest N.", show_default=False
        ),
    ] = None,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="TIME", help="Leave incomplete ones that changed since, as 30min.")
    ] = "1h",
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only named.")] = False,
    option: _Option = None,
) -> None:
    """Name, or remove, what is no complete checkpoint, and old ones."""
    from .checkpoints import clear_checkpoints
    from .storage_options import parse_options

    clear_checkpoints(source, parse_options(option or [], [source]), keep=keep, older_than=older_than, yes=yes)


@checkpoint.command("import")
def adopt(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A .pt, .pth or .safetensors file, a folder of these, or a DeepSpeed ZeRO folder."
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder or URL of checkpoints to write.")],
    job: Annotated[str, typer.Option("--job", metavar="FILE", help="The job file of the model that is to have them.")],
    rename: Annotated[
        list[str] | None,
        typer.Option("--rename", metavar="OLD=NEW", help="Replace the beginning of names, as 'module.='; repeatable."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="NAME", help="Which entry of the file's dictionary is the state dict."),
    ] = None,
    option: _Option = None,
) -> None:
    """Make a checkpoint of weights that something else saved, checked against the model of a job."""
    from .importing import import_weights
    from .storage_options import parse_options

    import_weights(source, target, job, rename or [], key, parse_options(option or [], [target]))
