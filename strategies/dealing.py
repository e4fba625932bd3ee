"""Building a model that no rank has room for: every rank draws all of the weights, and keeps its share of them.

The numbers are those of a model that is built whole: each rank runs the same constructors, and draws the same random
numbers in the same order.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..core.errors import JobError, Problem

_SMALL = 1024  # elements; fewer are not worth the messages
_AT_ONCE = 2**20  # elements of a share that are gathered together
_TRIM_AFTER = 32 * 2**20  # bytes
_ALONE = 2  # references to the storage of a tensor that nothing shares it with: its own, and that of who asks
_HARMLESS = frozenset(  # what a placeholder answers as the weight itself would
    (
        *("shape", "ndim", "dim", "size", "numel", "nelement", "__len__", "dtype", "type", "element_size", "layout"),
        *("device", "get_device", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_floating_point", "is_complex"),
        *("requires_grad", "requires_grad_", "is_leaf", "grad", "grad_fn", "names"),
    )
)


class Dealer(TorchFunctionMode):
    """While it is entered, a module's weights are dealt to the ranks as soon as it has become part of another module.

    In a dealt weight's place stands one element, expanded to its shape. A function of torch that is called with it gets
    it whole for as long as it runs, which is collective, as constructors run alike on every rank. A weight that
    something else shares memory with is left whole.
    """

    def __init__(self, *, rank: int, world: int) -> None:
        super().__init__()
        self._rank, self._world = rank, world
        self._shares: Any = WeakIdKeyDictionary()
        self._busy = False
        self._freed = 0

    def __enter__(self) -> Any:
        self._hook = register_module_module_registration_hook(self._registered)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._hook.remove()
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        touched = {} if self._busy or _name(func) in _HARMLESS else dict.fromkeys(self._dealt((args, kwargs)))
        if not touched:
            return func(*args, **kwargs)
        self.make_whole(touched)
        result = func(*args, **kwargs)
        self._deal(touched)
        return result

    def _registered(self, module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if submodule is not None and not self._busy:
            self._deal([weight for weight in submodule.parameters() if weight not in self._shares])

    def _dealt(self, value: Any) -> Iterator[nn.Parameter]:
        """The dealt weights among the arguments of a function."""
        if isinstance(value, nn.Parameter):
            if value in self._shares:
                yield value
        elif isinstance(value, (list, tuple)):
            for item in cast("Iterable[Any]", value):
                yield from self._dealt(item)
        elif isinstance(value, dict):
            for item in cast("dict[Any, Any]", value).values():
                yield from self._dealt(item)

    def _deal(self, weights: Iterable[nn.Parameter]) -> None:
        """Keep this rank's share of ``weights``. Collective: ranks may see other references, and must do the same."""
        with self._unwatched():
            large = [weight for weight in weights if _is_worth_it(weight)]
            if not large:
                return
            free = torch.tensor([_references(weight) <= _ALONE for weight in large], dtype=torch.int32)
            dist.all_reduce(free, dist.ReduceOp.MIN)
            for weight, deal in zip(large, free.tolist(), strict=True):
                if deal:
                    size = -(-weight.numel() // self._world)
                    share = torch.zeros(size, dtype=weight.dtype)
                    mine = weight.detach().view(-1)[self._rank * size : (self._rank + 1) * size]
                    share[: mine.numel()] = mine
                    self._shares[weight] = share
                    weight.data = _placeholder(weight, weight.device)
                    self._freed += weight.numel() * weight.element_size()
            self._trim()

    def make_whole(self, weights: Iterable[nn.Parameter]) -> None:
        """Give those of ``weights`` that are dealt their memory and values back. Collective."""
        with self._unwatched():
            self._trim()
            for weight in weights:
                share = self._shares.pop(weight, None)
                if share is not None:
                    self._freed += weight.numel() * weight.element_size()  # by whom it is handed to
                    weight.data = self._gathered(share)[: weight.numel()].view(weight.shape).to(weight.device)

    def _trim(self) -> None:
        """Have the C library give freed memory back now and then: shares lie between what was freed, and split it."""
        if self._freed > _TRIM_AFTER:
            self._freed = 0
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # malloc_trim(3), glibc's
            if trim is not None:
                trim(0)

    def _gathered(self, share: Tensor) -> Tensor:
        """All ranks' shares, one after the other; by way of small tensors, as a collective may hold on to its own."""
        whole = share.new_empty(self._world, share.numel())
        for begin in range(0, share.numel(), _AT_ONCE):
            part = share[begin : begin + _AT_ONCE]
            received = [torch.empty_like(part) for _ in range(self._world)]
            dist.all_gather(received, part)
            for row, values in zip(whole, received, strict=True):
                row[begin : begin + _AT_ONCE] = values
        return whole.view(-1)

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        """Refuse parts with a weight whose memory was taken from a dealt one in a way that torch does not tell of.

        Raises:
            JobError: there is one; it would hold no numbers.
        """
        for part, module in modules.items():
            for name, weight in module.named_parameters():
                if weight not in self._shares and weight.numel() >= _SMALL and not any(weight.stride()):
                    what = f"'{name}' of part '{part}' was made of a weight that was part of a module already"
                    hint = "clone() that one first, or use parallel.strategy: ddp"
                    raise JobError(Problem(what, "recipe", hint))

    def move(self, device: torch.device) -> None:
        """Have dealt weights be on ``device`` once they are whole; their shares stay on the CPU."""
        for weight in list(self._shares):
            weight.data = _placeholder(weight, device)

    @contextmanager
    def _unwatched(self) -> Generator[None]:
        """What is called within is our own."""
        before, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = before


def _is_worth_it(weight: nn.Parameter) -> bool:
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta
    return plain and weight.numel() >= _SMALL and weight.is_contiguous()


def _references(weight: nn.Parameter) -> int:
    count = torch._C._storage_Use_Count  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]  # no other
    return count(weight.untyped_storage()._cdata)


def _placeholder(weight: nn.Parameter, device: torch.device) -> Tensor:
    """One element, which nobody may read, expanded to a weight's shape."""
    return torch.full((1,), math.nan, dtype=weight.dtype, device=device).expand(weight.shape)


def _name(func: Callable[..., Any]) -> str:
    """What a function of torch is called; for the getter or setter of an attribute, the attribute's name."""
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", "") if func.__name__ in ("__get__", "__set__") else func.__name__
