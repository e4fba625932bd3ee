"""The blocks of a Transformer: rotary positions, grouped-query attention, SwiGLU, pre-normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def rotate(x: Tensor, *, base: float) -> Tensor:
    """Rotary position embedding (Su et al. 2021, "RoFormer"): pair i at step t is turned by t · base^(-2i/width).

    ``x`` is ``[samples, heads, steps, width]``; the first half of the width holds the pairs' first parts, the second
    half their second ones. Angles are computed here, in float32: there is no table that a checkpoint or a model built
    on the meta device would have to carry.
    """
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): several query heads share a key and value head.

    The heads are counted from the projections' outputs, so each may also hold only a share of them.
    """

    def __init__(self, dim: int, *, heads: int, kv_heads: int, causal: bool, rope_base: float) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.causal = causal
        self.rope_base = rope_base
        self.q = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[samples, steps, dim]`` to the same shape."""
        q, k, v = (self._heads(projection(x)) for projection in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(
            rotate(q, base=self.rope_base),
            rotate(k, base=self.rope_base),
            v,
            is_causal=self.causal,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Shazeer 2020, "GLU variants improve Transformer"."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then the feed-forward layer, each after an RMS norm and around a residual connection.

    Dropout is on what is added to the residual stream. There is none on attention weights: it would need random
    numbers per head, which ranks that share the heads could not draw alike, and the slow kernel on most devices.
    """

    def __init__(self, attention: Attention, feedforward: SwiGLU, *, dim: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=eps)
        self.attention = attention
        self.feedforward_norm = nn.RMSNorm(dim, eps=eps)
        self.feedforward = feedforward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[samples, steps, dim]`` to the same shape."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))
