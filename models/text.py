"""Metrics of models that predict the next token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.contracts import Batch
from .losses import cross_entropy


def token_metrics(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Bits per byte and accuracy of next-token predictions, one value per sample.

    ``logits`` is ``[samples, tokens, vocabulary]``, the batch's 'y' int64 ``[samples, tokens]``. Tokens are bytes,
    unless the batch says in 'bytes' (``[samples]``) how many bytes the targets of each sample stand for. Then the mean
    of 'bpb' is of the samples' own ratios; that of 'bits' over that of 'bytes' is the ratio of the whole text.
    """
    y = batch["y"]
    bits = cross_entropy(logits, y, per_sample=True) * (y.shape[1] / math.log(2))
    accuracy = (logits.argmax(dim=2) == y).to(torch.float32).mean(dim=1)
    if "bytes" not in batch.fields:
        return {"bpb": bits / y.shape[1], "accuracy": accuracy}
    count = batch["bytes"].to(bits.dtype)
    return {"bpb": bits / count, "bits": bits, "bytes": count, "accuracy": accuracy}
