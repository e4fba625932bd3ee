"""A job trained by a plain PyTorch loop in this process: the reference for every strategy.

Only what is not under test is dltrain's: the recipe's own loss, the order of samples, and the keys of random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from dltrain.core.contracts import Batch
from dltrain.core.job import Job
from dltrain.core.keys import derive
from dltrain.data.normalize import Normalizer
from dltrain.data.order import Order
from dltrain.data.sources import open_source
from dltrain.data.split import split
from dltrain.training.recipes import load_recipe
from torch import Tensor, nn


@dataclass
class Trained:
    """What a run gave: by part, losses and gradient norms of each step; and the final weights by ``<part>.<fqn>``."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def train_plainly(job: Job) -> Trained:
    """Train ``job`` with AdamW, clipping, warm-up and half a cosine, all written out; one thread, one process."""
    train, state = job.train, torch.get_rng_state()
    assert (train.optimizer.name, train.schedule.name, train.microbatches != "auto") == ("adamw", "cosine", True)
    source = open_source(job.data)
    indices = np.asarray(split(len(source), job.data.split)["train"])
    scale = Normalizer.fit(source, indices) if job.data.normalize else Normalizer()
    recipe = load_recipe(job)
    torch.manual_seed(derive(job.seed, "weights"))
    parts = recipe.parts()
    optimizers = {name: _adamw(part, job) for name, part in parts.items()}
    found = Trained({name: [] for name in parts}, {name: [] for name in parts})
    order = Order(len(indices), job.seed)
    total = (train.steps or 0) * train.global_batch
    for step in range(train.steps or 0):
        picked = indices[order.indices(step * train.global_batch, min((step + 1) * train.global_batch, total))]
        for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
            group["lr"] = train.optimizer.lr * _share(job, step)
        for number, (name, part) in enumerate(parts.items()):
            for other in parts.values():
                other.requires_grad_(other is part)
            optimizers[name].zero_grad()
            loss = 0.0
            for index, places in enumerate(np.array_split(picked, train.microbatches)):
                fields = scale.apply(source.fetch(places))
                torch.manual_seed(derive(job.seed, "step", step, index, number))
                share = recipe.loss(name, parts, Batch(fields, step, index, 1.0)) * (len(places) / len(picked))
                share.backward()
                loss += share.item()
            found.losses[name].append(loss)
            if train.clip_norm is not None:
                norm = nn.utils.clip_grad_norm_(part.parameters(), train.clip_norm).item()
                found.norms[name].append(norm)
            optimizers[name].step()
    found.weights = {
        f"{name}.{fqn}": t.detach() for name, part in parts.items() for fqn, t in part.state_dict().items()
    }
    torch.set_rng_state(state)
    return found


def _share(job: Job, step: int) -> float:
    warmup, steps = job.train.schedule.warmup_steps, job.train.steps or 0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _adamw(part: nn.Module, job: Job) -> torch.optim.Optimizer:
    spec = job.train.optimizer
    many, few = ([p for p in part.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
    groups = [{"params": many, "weight_decay": spec.weight_decay}, {"params": few, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=spec.lr, betas=(0.9, 0.999))
