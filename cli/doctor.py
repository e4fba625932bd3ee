"""``dltrain doctor``: the state of a cluster as a table, or as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.config import load_job
from ..core.errors import JobError
from ..launcher.diagnosis import Measured, rate, size
from ..launcher.doctor import Health, describe, examine_cluster
from ..models.registry import RECIPES
from .arguments import job_target


def show_health(
    target: Sequence[str], *, address: str | None, nodes: int | None, runs: Path, as_json: bool, quiet: bool
) -> int:
    """Look at the cluster and print what was found; 1 if a node is sick.

    Raises:
        JobError: the job is wrong, or there is no such cluster.
        RunFailed: its nodes could not be had.
    """
    named = job_target(target)
    if named.problems:
        raise JobError(*named.problems)
    job = load_job(named.job_file, named.overrides, {}, os.environ, recipes=RECIPES).job
    say = (lambda text: None) if quiet or as_json else _say
    health = examine_cluster(job, address=address, nodes=nodes, runs=runs, phase=say)
    sys.stdout.write(json.dumps(to_json(health), indent=2) + "\n" if as_json else to_text(health))
    return 1 if health.sick else 0


def to_json(health: Health) -> dict[str, Any]:
    """Everything that was found."""
    return {
        "healthy": not health.sick,
        "findings": [asdict(finding) for finding in health.findings],
        "nodes": [
            {
                **{
                    name: getattr(node, name)
                    for name in ("node", "hostname", "address", "interface", "cpus", "versions")
                },
                "vitals": asdict(health.asked[node.node].vitals),
                "clock_ahead": health.asked[node.node].ahead,
                "flops": health.measured.flops.get(node.node),
            }
            for node in health.nodes
        ],
        "links": [asdict(link) for link in health.measured.links],
        "all_reduce": health.measured.all_reduce or None,
        "wandb": health.tracker,
    }


def to_text(health: Health) -> str:
    """Tables and findings, as plain text of at most 100 columns."""
    lines = [*_table(_nodes(health)), *_joined(health.measured), *_places(health)]
    for finding in health.findings:
        mark = "SICK" if finding.sick else "note"
        lines += [
            "",
            f"{mark}  {describe(finding, health.nodes)}",
            *([f"      {finding.hint}"] if finding.hint else []),
        ]
    sick = sorted({node for finding in health.sick for node in finding.nodes})
    count = f"{len(health.nodes)} node{'s' if len(health.nodes) > 1 else ''}"
    verdict = f"not fit to train: node {', '.join(map(str, sick))}" if sick else f"{count}: healthy"
    return "\n".join([*lines, "", verdict]) + "\n"


def _nodes(health: Health) -> list[list[str]]:
    rows = [["node", "host", "address", "cores", "GPUs", "memory", "shm", "files", "compute", "torch", "python"]]
    for node in health.nodes:
        vitals, flops = health.asked[node.node].vitals, health.measured.flops.get(node.node)
        rows.append(
            [
                *(str(node.node), node.hostname[:20], node.address, str(node.cpus), str(len(vitals.gpus) or "-")),
                *(size(vitals.memory), size(vitals.shm), str(vitals.files)),
                f"{flops / 1e9:.0f} GFLOP/s" if flops else "-",
                *(node.versions.get(name, "-") for name in ("torch", "python")),
            ]
        )
    return rows


def _joined(measured: Measured) -> list[str]:
    """The links: each where there are few, else the worst."""
    if not measured.links:
        return []
    shown = measured.links if len(measured.links) <= 10 else sorted(measured.links, key=lambda x: x.bandwidth)[:5]
    rows = [["link", "latency", "bandwidth"]]
    rows += [[f"{k.one} - {k.other}", f"{1e3 * k.latency:.2f} ms", rate(k.bandwidth)] for k in shown]
    more = len(measured.links) - len(shown)
    rest = [f"and {more} faster ones"] if more else []
    return ["", *_table(rows), *rest, f"all-reduce over all: {rate(measured.all_reduce)} through each node"]


def _places(health: Health) -> list[str]:
    first = health.asked[0].vitals
    found = [f"{folder}: {size(free)} free" for folder, free in first.disks.items()]
    times = [asked.vitals.storage for asked in health.asked.values() if asked.vitals.storage is not None]
    if times:
        found.append(
            f"checkpoints: written and read by {len(times)} of {len(health.asked)} in {max(times):.2f} s at most"
        )
    if health.tracker == "":
        found.append("Weights & Biases: answers, and takes this key")
    return ["", *found]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _say(text: str) -> None:
    sys.stderr.write(f"dltrain: {text}\n")
