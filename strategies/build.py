"""The one place where a recipe becomes an engine: the order in which strategies compose."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core.contracts import Engine, Recipe
from ..core.job import Job, Optimizer
from .torch_engine import Mark, Reseed, TorchEngine


def build_engine(job: Job, recipe: Recipe, *, world: int, device: torch.device, reseed: Reseed, mark: Mark) -> Engine:
    """The engine that ``job.parallel`` asks for, on a process group of ``world`` ranks (none is needed for one).

    Every rank must have seeded torch alike, so that all start from the same weights.
    """
    axes = job.parallel.axes(world)
    parts = {name: part.to(device).train() for name, part in recipe.parts().items()}
    optimizers = {name: build_optimizer(part, job.train.optimizer) for name, part in parts.items()}
    if axes["data"] > 1:
        parts = {name: _ddp(part, device, job.parallel.bucket_mb) for name, part in parts.items()}
    return TorchEngine(
        recipe,
        parts,
        optimizers,
        data_ranks=axes["data"],
        clip_norm=job.train.clip_norm,
        reseed=reseed,
        mark=mark,
    )


def _ddp(part: nn.Module, device: torch.device, bucket_mb: float) -> nn.Module:
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(part, device_ids=ids, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)


def build_optimizer(module: nn.Module, spec: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that ``spec`` names, over the module's trainable parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    first, second = spec.betas
    match spec.name:
        case "sgd":
            return torch.optim.SGD(parameters, spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
        case "adam":
            return torch.optim.Adam(parameters, spec.lr, betas=(first, second), weight_decay=spec.weight_decay)
        case "adamw":
            return torch.optim.AdamW(parameters, spec.lr, betas=(first, second), weight_decay=spec.weight_decay)
