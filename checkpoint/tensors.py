"""Between torch tensors and the bytes of a shard. The only module of this folder that needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_PATTERNS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def code(dtype: torch.dtype) -> str:
    """The safetensors code of a dtype.

    Raises:
        TypeError: the format has none (complex128, quantized and sub-byte types).
    """
    if dtype not in _CODES:
        raise TypeError(f"safetensors has no code for {dtype}")
    return _CODES[dtype]


def to_bytes(tensor: Tensor) -> memoryview:
    """The elements, row-major, as bytes on the CPU; without a copy where they lie so already."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def bits(tensor: Tensor) -> np.ndarray | None:
    """The elements' bit patterns in the tensor's own memory, to be written to; None for a tensor on another device."""
    plain = tensor.detach()
    if plain.device.type != "cpu" or plain.is_conj() or plain.is_neg():
        return None
    return plain.view(_PATTERNS[plain.element_size()]).numpy()


def from_array(array: np.ndarray, dtype: str) -> Tensor:
    """The tensor whose bit patterns ``array`` holds as unsigned integers; it keeps the array's memory."""
    return torch.from_numpy(array).view(_DTYPES[dtype])


def typed(raw: Tensor, dtype: str) -> Tensor:
    """Bytes on the CPU, seen as elements of a dtype."""
    return raw.view(_DTYPES[dtype])
