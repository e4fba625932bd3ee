"""``dltrain plan``: what a job would take on machines that need not be there."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..core.config import load_job
from ..core.errors import JobError, Problem
from ..core.job import Job
from ..launcher.hardware import Machines, machines_for
from ..launcher.plan import Plan, make_plan
from ..launcher.rows import Row, label, size
from ..models.registry import RECIPES
from .arguments import job_target
from .render import parse_size

_KINDS = ("weights", "gradients", "optimizer", "activations", "communication", "snapshot", "margin", "reserve")
_WIDTH = 100
_SHOWN = 1024  # bytes; less is not worth a line


def show_plan(
    target: Sequence[str],
    *,
    nodes: int | None,
    per_node: int | None,
    gpu: str | None,
    memory: str | None,
    strategy: str | None,
    everything: bool,
    as_json: bool,
) -> int:
    """Print the plan of the job that ``target`` names; the exit code: 1 where nothing fits.

    Raises:
        JobError: the job, its recipe or data, or an option is wrong.
    """
    named = job_target(target)
    if named.problems:
        raise JobError(*named.problems)
    for name, value in (("--nodes", nodes), ("--gpus-per-node", per_node)):
        if value is not None and value < 1:
            raise JobError(Problem(f"{value} is not above 0", name))
    flags = {"parallel.strategy": strategy} if strategy is not None else {}
    job = load_job(named.job_file, named.overrides, flags, os.environ, recipes=RECIPES).job
    room = None if memory is None else parse_size(memory, "--memory")
    machines = machines_for(job, nodes=nodes, per_node=per_node, gpu=gpu, memory=room)
    plan = make_plan(job, machines, everything=everything, said=_say)
    if as_json:
        sys.stdout.write(json.dumps(_as_json(plan), indent=2) + "\n")
    else:
        _print(plan, target)
    return 0 if plan.best is not None else 1


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"dltrain: {text} …", file=sys.stderr, flush=True)  # noqa: T201  # a command speaks to its user


def _print(plan: Plan, target: Sequence[str]) -> None:
    console = Console(
        markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else _WIDTH, soft_wrap=False
    )
    console.print(_head(plan.job, plan.machines, plan))
    console.print(_table(plan))
    refused = [row for row in plan.rows if row.state != "fits"]
    if refused:
        reasons = Table.grid(padding=(0, 2))
        reasons.add_column(no_wrap=True)
        reasons.add_column(overflow="fold")
        for row in refused:
            reasons.add_row(f"  {title(row, plan.job)}", row.reason)
        console.print("\nnot these:")
        console.print(reasons)
    if plan.skipped:
        console.print(f"\n{plan.skipped} more involved ways were not looked at: --all does", style="dim")
    _print_choice(console, plan, target)


def _head(job: Job, machines: Machines, plan: Plan) -> str:
    gpu = machines.gpu.name
    where = f"{machines.nodes} × {machines.per_node} {gpu}" if machines.world > 1 else gpu
    return (
        f"{job.name}: {job.recipe}, {count(plan.parameters)} parameters ({size(plan.weights)}), "
        f"{job.train.precision}, {job.train.global_batch:,} samples a step\n"
        f"on {where}, {size(machines.memory)} for each rank\n"
    )


def _table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("#", justify="right")
    table.add_column("way", overflow="fold")
    for name in ("peak", "of it held", "sent/step", "s/step", "FLOP use"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate((row for row in plan.rows if row.state == "fits"), start=1):
        assert row.time is not None
        table.add_row(
            str(number),
            title(row, plan.job),
            f"{size(row.total)} ({row.total / plan.machines.memory:.0%})",
            size(sum(row.held.values())),
            size(row.on_the_wire),
            f"{row.time.total:.3g}",
            f"{use(row, plan):.0%}",
        )
    return table


def _print_choice(console: Console, plan: Plan, target: Sequence[str]) -> None:
    chosen = plan.best or plan.closest
    if chosen is None:
        console.print("\nno way to spread this job is possible: see the reasons above")
        return
    lead = "the first" if plan.best is not None else "nothing fits; what comes closest"
    console.print(f"\n{lead}: {title(chosen, plan.job)}")
    details = Table.grid(padding=(0, 2))
    details.add_column(no_wrap=True)
    details.add_column(overflow="fold")
    if chosen.mesh:
        mesh = ", ".join(f"{name} {ranks}" for name, ranks in chosen.mesh.items())
        details.add_row("  mesh", f"{mesh}; {chosen.microbatches} × {chosen.microbatch} samples a rank and step")
    memory = [f"{name} {size(chosen.memory[name])}" for name in _KINDS if chosen.memory.get(name)]
    details.add_row(f"  peak ({chosen.phase})" if chosen.phase else "  peak", ", ".join(memory))
    if chosen.time is not None:
        time = chosen.time
        details.add_row(
            "  a step",
            f"computing {time.computing:.3g} s, sending {time.sending:.2g} s more, waiting for stages "
            f"{time.waiting:.2g} s; {plan.job.train.global_batch / time.total:,.0f} samples/s",
        )
        for item in (item for item in chosen.sent if item.size >= _SHOWN):
            where = "in a node" if item.nodes == 1 else f"on {item.nodes} nodes"
            details.add_row(
                f"  {item.kind}", f"{size(item.size)} in {item.messages:,.0f} by {item.ranks} ranks {where}"
            )
    console.print(details)
    console.print("\nnext:")
    for command in commands(chosen, plan, target):
        console.print(f"  {command}", soft_wrap=True)


def commands(row: Row, plan: Plan, target: Sequence[str]) -> list[str]:
    """What to do next with a row, ready to paste."""
    machines = plan.machines
    words = [word for word in target if word.partition("=")[0] not in row.values]
    words += [f"{key}={value}".replace("=True", "=true") for key, value in row.values.items()]
    size = ["--nodes", str(machines.nodes), "--nproc-per-node", str(machines.per_node)]
    return [shlex.join(["dltrain", "launch", *words, *size])]


def title(row: Row, job: Job) -> str:
    """A row in few words; the job as it stands by what it says."""
    if row.values:
        return label(row.values)
    parallel = job.parallel
    sizes = {name: getattr(parallel, name) for name in ("tensor", "pipeline", "replicas")}
    said = {"strategy": parallel.strategy, **{name: size for name, size in sizes.items() if size > 1}}
    return f"the job: {label(said)}"


def use(row: Row, plan: Plan) -> float:
    """The share of the GPUs' arithmetic that a step uses."""
    gpu = plan.machines.gpu
    rate = gpu.full if plan.job.train.precision == "fp32" else gpu.half
    assert row.time is not None
    return row.flops / plan.machines.world / row.time.total / rate


def count(number: float) -> str:
    """``"6.74 billion"``."""
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,.0f}"


def _as_json(plan: Plan) -> dict[str, Any]:
    machines = plan.machines
    best = plan.best
    return {
        "job": plan.job.model_dump(mode="json"),
        "machines": {**asdict(machines), "gpu": asdict(machines.gpu)},
        "parameters": plan.parameters,
        "weights": plan.weights,
        "choice": None if best is None else dict(best.values),
        "rows": [_row_as_json(row) for row in plan.rows],
        "skipped": plan.skipped,
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    return {
        "values": dict(row.values),
        "state": row.state,
        "reason": row.reason,
        "mesh": dict(row.mesh),
        "bytes": {name: round(size) for name, size in row.memory.items()},
        "total_bytes": round(row.total),
        "phase": row.phase,
        "held_bytes": {name: round(size) for name, size in row.held.items()},
        "microbatch": row.microbatch,
        "microbatches": row.microbatches,
        "seconds": None if row.time is None else {**asdict(row.time), "total": row.time.total},
        "sent": [asdict(item) for item in row.sent],
        "sent_bytes": round(row.on_the_wire),
        "sent_bytes_between_nodes": round(row.between_nodes),
        "flops": row.flops,
    }
