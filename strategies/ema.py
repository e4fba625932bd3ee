"""An exponential moving average of the weights, beside the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Iterator, Mapping

import torch
from torch import Tensor, nn

from .shards import local


class Ema:
    """Averages weights, or whatever pieces of them this rank holds.

    The decay of update ``t`` (from 0) is ``min(decay, (1 + t) / (10 + t))``, so that the start is forgotten soon (as
    TensorFlow's ExponentialMovingAverage with ``num_updates``).
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Average ``weights``, which are named ``<part>.<fqn>`` and trained in place."""
        self._decay = decay
        self._pairs = {name: (weight, weight.detach().clone()) for name, weight in weights.items()}

    def update(self, step: int, *, skipped: Collection[str] = ()) -> None:
        """Take in the weights after optimizer step ``step``, but those of the parts whose step was ``skipped``."""
        decay = min(self._decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, (parameter, average) in self._pairs.items():
                if name.partition(".")[0] not in skipped:
                    local(average).lerp_(local(parameter), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Generator[None]:
        """The averages in the place of the weights, which come back unchanged to the bit."""
        with torch.no_grad():
            kept = [parameter.detach().clone() for parameter, _ in self._pairs.values()]
            for parameter, average in self._pairs.values():
                parameter.copy_(average)
            try:
                yield
            finally:
                for (parameter, _), weight in zip(self._pairs.values(), kept, strict=True):
                    parameter.copy_(weight)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The averages by ``<part>.<fqn>``."""
        for name, (_, average) in self._pairs.items():
            yield name, average


def trainable(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The trainable parameters of a recipe's parts, by ``<part>.<fqn>``."""
    return {
        f"{part}.{name}": parameter
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
