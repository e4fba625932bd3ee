"""What every engine does alike: a microbatch's forward and backward pass, while the other parts stand still."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.contracts import Batch, DrawsSamples, Recipe
from ..core.tree import tree_sum

#: Called with the phase that begins: "forward", "backward", "optimizer".
Mark = Callable[[str], None]
#: Called before each forward with (step, microbatch, number of the part); seeds all randomness.
Reseed = Callable[[int, int, int], None]
#: Makes the context for one forward pass.
Precision = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class Passes:
    """The passes of a recipe's losses.

    Gradients of a step are the mean over the step's samples, whichever rank computed them: each microbatch's mean loss
    is scaled by its weight, and by the number of ranks, since strategies average over them.

    Attributes:
        ranks: data-parallel ranks that gradients are averaged over; 1 where they are added up.
        counts: whether this rank's share of a loss counts: one rank's of each group that computes the same samples.
    """

    recipe: Recipe
    ranks: int
    counts: bool
    precision: Precision
    reseed: Reseed
    mark: Mark

    def run(
        self,
        name: str,
        number: int,
        modules: Mapping[str, nn.Module],
        batch: Batch,
        backward: Callable[[Tensor, float], None],
    ) -> Tensor:
        """One microbatch of part ``name``; its share of the step's mean loss (float32 scalar).

        ``number`` is the part's place in the recipe, which its randomness is keyed by. ``backward`` is called with the
        loss and what to scale it by.
        """
        self.reseed(batch.step, batch.index, number)
        self.mark("forward")
        with self.precision():
            loss = self.recipe.loss(name, modules, batch)
        self.mark("backward")
        backward(loss, batch.weight * self.ranks)
        return loss.detach().float() * (batch.weight if self.counts else 0.0)

    def samples(self, modules: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
        """What the recipe draws with ``modules``; nothing if it does not draw."""
        if not isinstance(self.recipe, DrawsSamples):
            return {}
        with torch.no_grad(), self.precision():
            return self.recipe.samples(modules)


def sum_up(shares: Mapping[int, Tensor]) -> Tensor:
    """The sum of a rank's microbatches' shares (float64), along the tree that the ranks' sums are added up by."""
    return tree_sum([share.double() for share in shares.values()])


@contextlib.contextmanager
def others_frozen(modules: Mapping[str, nn.Module], name: str) -> Generator[None]:
    """No gradient is computed for the weights of the parts that only help to train ``name``."""
    others = [
        parameter
        for other, module in modules.items()
        if other != name
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
