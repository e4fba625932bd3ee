"""Which attention kernel a GPU would take, on a machine that has none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_WIDEST = 256  # of a head, that the fused kernels take
_HALF = (torch.float16, torch.bfloat16)


class Fused(TorchFunctionMode):
    """Has ``scaled_dot_product_attention`` keep no matrix of scores where a GPU's kernels would not.

    Dao et al. 2022, "FlashAttention"; in float32 Rabe and Staats 2021, "Self-attention does not need O(n²) memory".

    Args:
        plain: number formats that such a kernel takes: "half", "full".
        grouped: those of them that it takes with fewer key heads than query heads.
    """

    def __init__(self, plain: Collection[str], grouped: Collection[str]) -> None:
        super().__init__()
        self._plain, self._grouped = plain, grouped

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and self._takes(args, kwargs):
            query, key, value, *more = args
            mask = kwargs.get("attn_mask", more[0] if more else None)
            causal = kwargs.get("is_causal", more[2] if len(more) > 2 else False)
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # all of them keep the same
            query, key, value = (tensor.to(self._dtype(query)) for tensor in (query, key, value))
            return kernel(query, key, value, 0.0, causal, attn_mask=mask, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)

    def _takes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if len(args) < 3 or not all(isinstance(arg, Tensor) and arg.dim() == 4 for arg in args[:3]):
            return False
        query, key, _ = args[:3]
        formats = self._plain if query.shape[1] == key.shape[1] else self._grouped
        return query.shape[-1] <= _WIDEST and ("half" if self._dtype(query) in _HALF else "full") in formats

    def _dtype(self, query: Tensor) -> torch.dtype:
        """What autocast, which comes after this, will make of it."""
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
