"""Evaluation over a part of the data: exact means over samples, whoever computes them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from ..core.contracts import Batch, Engine


def evaluate(
    engine: Engine, batches: Iterable[tuple[Batch, int]], *, world: int, counts: bool = True
) -> dict[str, float]:
    """The mean of each of the recipe's metrics over all samples of all ranks' ``batches``.

    ``batches`` gives (batch, number of its samples that count), to all ranks equally many. Collective over the process
    group when ``world`` > 1. ``counts`` says whether this rank's results do: of ranks that compute the same samples
    together, one's. Sums of batches are added up in float64 in the batches' order, of which each rank has a run: the
    number of ranks changes no bit.
    """
    sums: dict[str, list[torch.Tensor]] = {}
    count = 0
    for batch, samples in batches:
        found = engine.evaluate(batch)
        if not (samples and counts):
            continue
        for name, values in found.items():
            if values.shape != (samples,):
                raise ValueError(
                    f"metric {name!r} must be one value per sample: ({samples},), not {tuple(values.shape)}"
                )
            sums.setdefault(name, []).append(values.double().sum())
        count += samples
    local = (count, {name: torch.stack(values).tolist() for name, values in sums.items()})
    everyone: list[tuple[int, dict[str, list[float]]]] = [local]
    if world > 1:
        gathered: list[tuple[int, dict[str, list[float]]] | None] = [None] * world
        dist.all_gather_object(gathered, local)
        everyone = [item for item in gathered if item is not None]
    total_count = sum(samples for samples, _ in everyone)
    names = sorted({name for _, values in everyone for name in values})
    return {
        name: sum(value for _, values in everyone for value in values.get(name, [])) / total_count for name in names
    }
