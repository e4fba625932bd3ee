"""How a part's module works together with its copies, or the other shards, on the data-parallel ranks."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod

from torch import nn


class Spread(ABC):
    """A part's module under a data-parallel strategy. One level: implementations are final.

    Attributes:
        module: the recipe's own module; its names are those of the part's state.
        trained: what is called where the part is trained.
        helping: what is called where the part only helps to train another, or is evaluated. Of all ranks alike where
            weights are gathered.
    """

    module: nn.Module
    trained: nn.Module
    helping: nn.Module

    @abstractmethod
    def reducing(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Around forward and backward of one of a step's microbatches: gradients are reduced by the ``last`` one."""

    @abstractmethod
    def rest(self) -> None:
        """Let go of gathered weights. Between steps, ``module`` holds what lies on this rank."""


class Alone(Spread):
    """One data-parallel rank: nothing to work together with."""

    def __init__(self, module: nn.Module) -> None:
        self.module = self.trained = self.helping = module

    def reducing(self, last: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def rest(self) -> None:
        """Nothing was gathered."""
