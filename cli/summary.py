"""What a finished run shows: the metrics, where the time went, the run directory, and commands to paste."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.job import Job
from .render import data_size

if TYPE_CHECKING:
    from ..launcher.carry import RunResult
    from ..launcher.failure import Cost

_RESTARTS_SHOWN = 3


def print_summary(job: Job, result: RunResult) -> None:
    """Print the summary of a finished job to standard output."""
    from ..launcher.view import duration

    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    run = shown(result.run_dir)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in sorted(result.metrics.items()):
        table.add_row(name, f"{value:.2%}" if name.endswith("accuracy") else f"{value:.4g}")
    total = sum(result.seconds.values())
    spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in result.seconds.items())
    table.add_row("goodput", f"{result.goodput:.0%} of {duration(total)} ({spent})")
    if result.checkpoints:
        table.add_row("checkpoints", _cost(result.checkpoints))
    for words in result.slow:
        table.add_row("slow", words)
    if result.restarts:
        table.add_row("restarts", f"{result.restarts}{_restarts(result.costs)}")
    table.add_row("run", str(run))
    table.add_row("W&B", result.tracking.url or f"{result.tracking.state}, {result.tracking.rows} rows")
    console.print(f"\n{job.name}: {result.status} after {result.step} steps", style="bold")
    console.print(table)
    console.print("\nnext:")
    for command, what in _next_commands(job, run, result):
        console.print(Text.assemble("  ", command, (f"    # {what}", "dim")))


def _cost(checkpoints: Sequence[Mapping[str, float]]) -> str:
    from ..launcher.view import duration

    waited = sum(cost["stall_seconds"] for cost in checkpoints)
    slowest = max(cost["durable_seconds"] for cost in checkpoints)
    size = data_size(checkpoints[-1]["bytes"])
    return f"{len(checkpoints)} of {size}: training waited {waited:.2f} s, durable within {duration(slowest)}"


def _restarts(costs: Sequence[Cost]) -> str:
    """What restarts cost, and what the last ones went on from."""
    if not costs:
        return ""
    again, seconds = sum(cost.steps for cost in costs), sum(cost.seconds for cost in costs)
    sources = "; ".join(f"went on {cost.source}" for cost in costs[-_RESTARTS_SHOWN:])
    return f" ({again} {'step' if again == 1 else 'steps'} done again, {seconds:.1f} s; {sources})"


def _next_commands(job: Job, run: Path, result: RunResult) -> list[tuple[str, str]]:
    quoted = shlex.quote(str(run))
    elsewhere = " checkpoint.to=null" if job.checkpoint.to else ""  # that place holds this run's checkpoints
    commands = [
        (f"xdg-open {quoted}/report.html", "curves"),
        (f"dltrain launch {quoted}/job.yaml --resume never{elsewhere}", "the same job again"),
    ]
    if result.tracking.command:
        commands.append((result.tracking.command, "send the metrics to Weights & Biases"))
    return commands


def shown(path: Path) -> Path:
    """``path`` as a person at the working directory would write it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
