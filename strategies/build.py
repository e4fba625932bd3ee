"""The one place where a recipe becomes an engine: the order in which strategies compose."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core.contracts import Engine, Recipe
from ..core.errors import JobError, Problem, did_you_mean
from ..core.job import Job
from .ema import Ema, trainable
from .optimizers import build_optimizers
from .passes import Mark, Passes, Precision, Reseed
from .recompute import recompute
from .torch_engine import TorchEngine, Trained


def build_engine(job: Job, recipe: Recipe, *, world: int, device: torch.device, reseed: Reseed, mark: Mark) -> Engine:
    """The engine that ``job.parallel`` asks for, on a process group of ``world`` ranks (none is needed for one).

    Every rank must have seeded torch alike, so that all start from the same weights.

    Raises:
        JobError: the job's optimizers do not fit the recipe's parts.
    """
    axes = job.parallel.axes(world)
    modules = {name: part.to(device).train() for name, part in recipe.parts().items()}
    check_parts(job, modules)
    for name, module in modules.items():
        if job.train.recompute:
            recompute(module, recipe.layout(name).units)
    passes = Passes(recipe, axes["data"], _precision(job, device), reseed, mark)
    if job.parallel.zero_stage:
        from .deepspeed_engine import ZeroEngine  # DeepSpeed is an extra

        return ZeroEngine(passes, modules, job, world=world, device=device)
    parts: dict[str, Trained] = {}
    for name, module in modules.items():
        if job.train.compile:
            module.compile()
        wrapped = _ddp(module, device, job.parallel.bucket_mb) if axes["data"] > 1 else module
        spec = job.train.optimizer_of(name)
        parts[name] = Trained(wrapped, build_optimizers(module, spec), spec.every)
    ema = Ema(trainable(modules), job.train.ema) if job.train.ema is not None else None
    return TorchEngine(passes, parts, clip_norm=job.train.clip_norm, ema=ema)


def check_parts(job: Job, modules: dict[str, nn.Module]) -> None:
    """Refuse optimizers for parts that the recipe does not have.

    Raises:
        JobError: there is one.
    """
    for name in job.train.parts:
        if name not in modules:
            hint = did_you_mean(name, modules)
            raise JobError(Problem(f"{job.recipe} has no part '{name}'", "train.parts", hint))


def _ddp(part: nn.Module, device: torch.device, bucket_mb: float) -> nn.Module:
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(part, device_ids=ids, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)


def _precision(job: Job, device: torch.device) -> Precision:
    if job.train.precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)
