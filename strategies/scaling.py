"""Dynamic loss scaling, which keeps small gradients from vanishing in float16.

Micikevicius et al. 2018, "Mixed precision training".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..core.contracts import Scaling, Shard
from .finite import check

_FIRST, _GROWTH, _BACKOFF, _INTERVAL = 2.0**16, 2.0, 0.5, 2000  # of torch.amp.GradScaler
_LARGEST = 2.0**100  # so that it stays finite


class LossScale:
    """What the loss of one part is multiplied by, on all ranks alike, and its gradients are divided by.

    It falls by half when gradients overflow, and doubles after 2000 steps without. As torch's GradScaler, which decides
    for each optimizer on each rank alone: here a part's whole step is skipped on all ranks, or none of it.
    """

    def __init__(self, part: str) -> None:
        self._part = part
        self._scale = torch.tensor(_FIRST)
        self._good = torch.tensor(0)
        self._skipped = torch.tensor(0)

    @property
    def factor(self) -> float:
        """A power of two, so that multiplying and dividing by it rounds nothing."""
        return self._scale.item()

    def unscale(self, weights: Sequence[nn.Parameter], *, world: int, device: torch.device) -> Scaling:
        """Divide the gradients of ``weights``, this rank's on ``device``, and settle whether the step is to be skipped.

        Collective over ``world`` ranks. On a GPU the host waits here for the gradients.
        """
        factor = self.factor
        grads = [weight.grad for weight in weights if weight.grad is not None]
        found = check(grads, inverse=1 / factor, device=device)
        if world > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return self.settle(bool(found))

    def settle(self, overflowed: bool) -> Scaling:
        """Count a step, and choose the scale of the next one.

        Raises:
            FloatingPointError: gradients overflow although the loss is not scaled up any more.
        """
        factor = self.factor
        if overflowed:
            self._skipped += 1
            self._good.zero_()
            self._scale *= _BACKOFF
            if self.factor < 1:
                raise FloatingPointError(
                    f"the gradients of part '{self._part}' are not finite in float16, even of a loss that is "
                    "not scaled: look for a cause in the loss, lower the learning rate, or use train.precision: bf16"
                )
        else:
            self._good += 1
            if self._good == _INTERVAL:
                self._good.zero_()
                self._scale.mul_(_GROWTH).clamp_(max=_LARGEST)
        return Scaling(factor, int(self._skipped), overflowed)

    def state(self) -> Iterator[tuple[str, Shard]]:
        """What a checkpoint keeps, by name; live."""
        for name, tensor in (("scale", self._scale), ("good", self._good), ("skipped", self._skipped)):
            yield f"scaling.{self._part}.{name}", Shard((), (), tensor)
