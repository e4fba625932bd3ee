"""``parallel.strategy: auto``: the first choice of the plan, for the nodes that a launch has."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.elastic import legal_nodes
from ..core.errors import JobError, Problem
from ..core.job import Job
from .candidates import applied, candidates, with_values
from .demand import Demand
from .hardware import Machines, options_of
from .plan import Plan, make_plan
from .rows import Row, label, size


@dataclass(frozen=True)
class Choice:
    """A job whose strategy is settled.

    Attributes:
        job: it names a strategy.
        values: what was chosen, by dotted key; empty where the job said it itself.
        why: that in words; empty as well.
    """

    job: Job
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    why: str = ""


def choose(
    job: Job,
    *,
    demand: Demand,
    before: Mapping[str, Any],
    machines: Callable[[], Machines],
    target: Sequence[str],
    meanwhile: Callable[[], None],
) -> Choice:
    """Settle the strategy of ``job`` where it is open.

    Args:
        demand: the nodes, and the ranks on each.
        before: what the run that is continued has chosen; it stays where it still can be.
        machines: looks at the nodes.
        target: the job as a command line names it, for the command that shows the whole plan; or empty.
        meanwhile: called while the plan is made; what it raises ends that.

    Raises:
        JobError: nothing fits, or the job's data or recipe are wrong.
        RunFailed: a process that followed a step died.
    """
    if not job.parallel.is_open:
        return Choice(job)
    if before:
        way = with_values(job, before, nodes=demand.nodes, per_node=demand.ranks)
        if not way.reason:
            return Choice(applied(job, before), before, f"strategy: {label(before)}, which the run has chosen before")
    there = machines()
    nodes = _fewest(job, there)
    planned = Machines(nodes, there.per_node, there.gpu, there.memory)
    plan = make_plan(job, planned, briefly=True, said=lambda _: None, meanwhile=meanwhile)
    command = f"; the whole table: {_command(job, planned, target)}" if target else ""
    if plan.best is None:
        raise JobError(*_refusal(plan, command))
    settled = applied(job, plan.best.values)
    why = f"strategy: {label(plan.best.values)}, {_reason(plan, plan.best)}"
    if job.recovery.node_range is not None:
        sizes = " or ".join(map(str, legal_nodes(settled, there.per_node)))
        why += f"; chosen for {nodes} nodes, and possible with {sizes}"
    return Choice(settled, plan.best.values, why + command)


def _fewest(job: Job, there: Machines) -> int:
    """The fewest nodes that the run may have, if their number may change."""
    least, most = job.recovery.node_range or (there.nodes, there.nodes)
    for nodes in range(least, most):
        if any(not way.reason for way in candidates(job, nodes=nodes, per_node=there.per_node)):
            return nodes
    return most


def _command(job: Job, planned: Machines, target: Sequence[str]) -> str:
    """What shows the whole plan."""
    sizes = [f"recovery.nodes={job.recovery.nodes}", f"resources.nodes={planned.nodes}"] if job.recovery.nodes else []
    return shlex.join(["dltrain", "plan", *target, *sizes, *options_of(planned)])


def _reason(plan: Plan, best: Row) -> str:
    """Why it is the first, in one line."""
    taken = f"{size(best.total)} of {size(plan.machines.memory)} a rank"
    large = [row for row in plan.rows if row.state == "too large"]
    if large:
        return f"{taken} ({large[-1].values['parallel.strategy']} would take {size(large[-1].total)})"
    fits = sum(row.state == "fits" for row in plan.rows)
    return f"{taken}, the first of {fits} that fit" if fits > 1 else f"{taken}, and no other would be notably faster"


def _refusal(plan: Plan, command: str) -> list[Problem]:
    closest = f"what comes closest: {label(plan.closest.values)}" if plan.closest is not None else ""
    hint = "; ".join(filter(None, [closest, command.removeprefix("; ")]))
    memory = f" within the {size(plan.machines.memory)} of each rank" if plan.closest is not None else ""
    head = Problem(f"no strategy fits{memory}", "parallel.strategy", hint)
    return [head, *(Problem(row.reason, label(row.values)) for row in plan.rows)]
