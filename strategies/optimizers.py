"""A part's optimizers by name, with weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..core.train import Optimizer


def build_optimizers(
    module: nn.Module, spec: Optimizer, pieces: Iterable[nn.Parameter] | None = None
) -> list[torch.optim.Optimizer]:
    """The optimizers that ``spec`` names, over the module's trainable parameters: one, or two for 'muon'.

    Where this rank holds ``pieces`` of the parameters they are updated instead.

    Parameters with fewer than two dimensions (norms, biases) are in a group of their own without weight decay.

    Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") takes the matrices; embeddings,
    convolutions' kernels, norms and biases go to AdamW with the same learning rate, as torch's Muon asks for. Its
    updates are scaled to AdamW's size (Liu et al. 2025, "Muon is scalable for LLM training"), so that one rate suits
    both.
    """
    trainable = [p for p in module.parameters() if p.requires_grad] if pieces is None else list(pieces)
    if spec.name != "muon":
        return [_build(trainable, spec, spec.name)]
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in trainable if p.dim() == 2 and id(p) not in embeddings]
    chosen = {id(p) for p in matrices}
    others = [p for p in trainable if id(p) not in chosen]
    return [_build(group, spec, name) for group, name in ((matrices, "muon"), (others, "adamw")) if group]


def _build(parameters: list[nn.Parameter], spec: Optimizer, name: str) -> torch.optim.Optimizer:
    groups = list(_groups(parameters, spec.weight_decay))
    first, second = spec.betas
    match name:
        case "sgd":
            return torch.optim.SGD(groups, spec.lr, momentum=spec.momentum, nesterov=spec.nesterov)
        case "adam":
            return torch.optim.Adam(groups, spec.lr, betas=(first, second), eps=spec.eps)
        case "adafactor":
            return torch.optim.Adafactor(groups, spec.lr)
        case "muon":
            return torch.optim.Muon(groups, spec.lr, momentum=spec.momentum, adjust_lr_fn="match_rms_adamw")
        case _:
            return torch.optim.AdamW(groups, spec.lr, betas=(first, second), eps=spec.eps)


def _groups(parameters: Iterable[nn.Parameter], decay: float) -> Iterable[dict[str, Any]]:
    """The parameters that decay, and those that do not; a group that would be empty is left out."""
    listed = list(parameters)
    for params, weight_decay in (
        ([p for p in listed if p.dim() >= 2], decay),
        ([p for p in listed if p.dim() < 2], 0.0),
    ):
        if params:
            yield {"params": params, "weight_decay": weight_decay}
