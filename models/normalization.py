"""Normalisation of convolutions, and what batch normalisation means when a batch is spread over ranks."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

NormKind = Literal["none", "group", "batch"]
BatchNormKind = Literal["microbatch", "synchronised"]


def norm2d(channels: int, *, kind: NormKind, groups: int, batch_norm: BatchNormKind) -> nn.Module:
    """The normalisation layer of ``[samples, channels, height, width]``; an identity where ``kind`` is 'none'."""
    match kind:
        case "none":
            return nn.Identity()
        case "group":
            return nn.GroupNorm(groups, channels)
        case "batch":
            return SynchronisedBatchNorm2d(channels) if batch_norm == "synchronised" else nn.BatchNorm2d(channels)


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of the microbatches that all ranks compute at the same time.

    What ``torch.nn.SyncBatchNorm`` does on GPUs, on every device: its kernels exist for GPUs only. In training the
    forward and the backward pass are collective over ``process_group``. Evaluation uses the running statistics, and
    communicates nothing. Running statistics are those of torch: an exponential average of mean and unbiased variance.

    Attributes:
        process_group: the ranks that share statistics; None is all of them.
    """

    process_group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size(self.process_group) > 1):
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        sums = torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])])
        sums = _sum_over_ranks(sums, self.process_group)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean[:, None, None]
        # In a second pass, because the difference of two large sums would lose the digits.
        variance = _sum_over_ranks(centred.square().sum((0, 2, 3)), self.process_group) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients: every rank's loss depends on every rank's term."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return cast(Tensor, _SumOverRanks.apply(tensor, group))
