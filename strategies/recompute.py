"""Activation checkpointing (Chen et al. 2016, "Training deep nets with sublinear memory cost")."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module, units: Sequence[str]) -> None:
    """Have each of the submodules named ``units`` keep only its inputs, and compute the rest again in backward.

    Names of parameters stay what they are. Dropout draws the same masks again.
    """
    for name in units:
        unit = module.get_submodule(name)
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
