"""What a step of training holds, sends and computes, followed on tensors without memory.

A dispatch mode sees every operation. It follows each storage from the operation that makes it until the last reference
to it is gone, as an allocator would, counts floating-point operations (torch's own formulas), and notes what
collectives send. Storages that are resized in place, as FSDP's, are followed too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

#: What memory is held for. 'other' is activations, and all that lives within an operation's neighbourhood only.
Kind = Literal["weights", "gradients", "optimizer", "communication", "other"]
KINDS: tuple[Kind, ...] = ("weights", "gradients", "optimizer", "communication", "other")

_HOST = 65536  # elements; integers of fewer are figures that programs read, such as a mesh or a message
_HALF = (torch.float16, torch.bfloat16)
_DEVICE = torch.ops.prim.device.default
_REDUCES = ("allreduce", "all_reduce")
_SCATTERS = ("reduce_scatter",)
_GATHERS = ("allgather", "all_gather")


@dataclass(frozen=True)
class Rates:
    """What a device does in a second at best.

    Attributes:
        half: floating-point operations on 16-bit matrices.
        full: the same in float32.
        memory: bytes that it reads or writes.
        launch: seconds that an operation takes at least.
    """

    half: float
    full: float
    memory: float
    launch: float


@dataclass
class Section:
    """A stretch of a step, such as the first half of a forward pass.

    Attributes:
        name: its phase: "forward", "backward", "optimizer", "evaluate", "build".
        peak: bytes by kind at the moment of it when most were held, in the order of :data:`KINDS`.
        seconds: the operations' least time.
        flops: floating-point operations.
        sent: by ("reduce" | "scatter" | "gather" | "point", ranks of the group, nodes that it spans): bytes that one
            rank sends.
        messages: by the same, how many collectives.
    """

    name: str
    peak: list[float]
    seconds: float = 0.0
    flops: float = 0.0
    sent: dict[tuple[str, int, int], float] = field(default_factory=dict[tuple[str, int, int], float])
    messages: dict[tuple[str, int, int], float] = field(default_factory=dict[tuple[str, int, int], float])


class Ledger(TorchDispatchMode):
    """Stands above a FakeTensorMode and keeps the books of what runs under both.

    Args:
        rates: of the device that is thought of.
        per_node: ranks on each node.
        gloo: whether collectives are gloo's, which scatters sums by way of a copy of all of them.
        deliver: gives a received message, which is in host memory, its content, by its tag.
    """

    def __init__(
        self,
        rates: Rates,
        *,
        per_node: int,
        gloo: bool,
        deliver: Callable[[Tensor, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.sections: list[Section] = []
        self._rates, self._per_node, self._gloo, self._deliver = rates, per_node, gloo, deliver
        self._held: dict[int, tuple[int, int]] = {}  # by storage: bytes, kind
        self._alarms: set[int] = set()
        self._now = [0] * len(KINDS)
        self._series: list[tuple[int, ...]] = []
        self._current = Section("build", [])
        self._groups: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        self._resize = torch.UntypedStorage.resize_
        ledger, resize = self, self._resize

        def followed(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            ledger._resized(storage)

        torch.UntypedStorage.resize_ = followed  # pyright: ignore[reportAttributeAccessIssue]  # no dispatch mode sees it
        self._propagate = propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def unseen(self: ShardingPropagator, op_schema: Any) -> Any:
            """DTensor finds out the shape of a whole result, of which no rank has more than a piece."""
            with _disable_current_modes():
                return propagate(self, op_schema)

        ShardingPropagator._propagate_tensor_meta_non_cached = unseen
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize
        ShardingPropagator._propagate_tensor_meta_non_cached = self._propagate

    def begin(self, name: str) -> None:
        """Close the section that is open, in two halves, and open the next."""
        self.sections += self._halves()
        self._current, self._series = Section(name, []), [tuple(self._now)]

    def tag(self, tensors: Iterable[Tensor | None], kind: Kind, *, over: Sequence[Kind] = KINDS) -> None:
        """Say what ``tensors`` are held for, where they were thought to be of a kind in ``over``."""
        number, before = KINDS.index(kind), [KINDS.index(name) for name in over]
        for tensor in tensors:
            for storage in _storages(tensor):
                held = self._held.get(storage._cdata)
                if held is not None and held[1] in before:
                    self._count(-held[0], held[1])
                    self._held[storage._cdata] = (held[0], number)
                    self._count(held[0], number)

    def tag_rest(self, kind: Kind) -> None:
        """Say what everything is held for that is held for no purpose yet."""
        number, other = KINDS.index(kind), KINDS.index("other")
        for key, (size, before) in self._held.items():
            if before == other:
                self._held[key] = (size, number)
        self._now[number] += self._now[other]
        self._now[other] = 0

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Follow ``tensors`` from now on."""
        for tensor in tensors:
            for storage in _storages(tensor):
                self._see(storage)

    @property
    def phase(self) -> str:
        """The section that is open."""
        return self._current.name

    @property
    def now(self) -> dict[Kind, int]:
        """Bytes that are held, by kind."""
        return dict(zip(KINDS, self._now, strict=True))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # of all calls most are this question
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with what it does to this rank's piece
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if func.namespace in ("c10d", "_c10d_functional"):
            self._collective(func, args, given)
        elif not any(isinstance(tensor, FakeTensor) for tensor in given):
            result = None if given else func(*args, **kwargs)
            if result is None or _is_figure(result):
                with _disable_current_modes():
                    return func(*args, **kwargs)
            self._made(func, args, kwargs, given, result)
            return result
        try:
            result = func(*args, **kwargs)
        except DataDependentOutputException:
            return self._answer(given[0])
        self._made(func, args, kwargs, given, result)
        return result

    def _answer(self, figure: Tensor) -> bool | int:
        """What a program is told that asks for a value: all is as it should be, nothing has overflowed."""
        return figure.dtype == torch.bool and figure.untyped_storage()._cdata not in self._alarms

    def _made(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], result: Any) -> None:
        fresh = 0
        leaves = [leaf for leaf in _tensors((result,)) if not leaf.is_meta]
        for leaf in leaves:
            fresh += self._see(leaf.untyped_storage())
            if func.overloadpacket is torch.ops.aten.any:  # such as: is any of them not finite
                self._alarms.add(leaf.untyped_storage()._cdata)
        if func.namespace == "_c10d_functional":
            self.tag(leaves, "communication", over=("other",))
        if not fresh and (func.is_view or not func._schema.is_mutable):
            return  # a view, or a question
        touched = sum(tensor.numel() * tensor.itemsize for tensor in given) + fresh
        count = _FLOPS.get(func.overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=result)
        half = bool(given) and given[0].dtype in _HALF
        rate = self._rates.half if half else self._rates.full
        self._current.flops += flops
        self._current.seconds += max(flops / rate, touched / self._rates.memory, self._rates.launch)
        self._series.append(tuple(self._now))

    def _see(self, storage: torch.UntypedStorage) -> int:
        """Follow ``storage`` if it is new; its bytes then, else 0."""
        key = storage._cdata
        if key in self._held:
            return 0
        size = storage.nbytes()
        self._held[key] = (size, _OTHER)
        self._count(size, _OTHER)
        weakref.finalize(storage, self._gone, key).atexit = False
        return size

    def _gone(self, key: int) -> None:
        size, kind = self._held.pop(key)
        self._alarms.discard(key)
        self._count(-size, kind)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        held = self._held.get(storage._cdata)
        if held is None:
            return
        size, kind = storage.nbytes(), held[1]
        self._held[storage._cdata] = (size, kind)
        self._count(size - held[0], kind)
        self._series.append(tuple(self._now))

    def _count(self, size: int, kind: int) -> None:
        self._now[kind] += size

    def _halves(self) -> list[Section]:
        """The open section in two: where a peak lies within a half does not depend on how deep a model is."""
        whole, middle = self._current, (len(self._series) + 1) // 2
        first, second = self._series[:middle], self._series[middle:] or self._series[-1:]
        if not first:
            return []
        peaks = [list(max(part, key=sum)) for part in (first, second)]
        whole.peak = cast("list[float]", peaks[0])
        return [whole, Section(whole.name, cast("list[float]", peaks[1]))]

    def _collective(self, func: Any, args: tuple[Any, ...], given: list[Tensor]) -> None:
        name: str = func.overloadpacket.__name__
        if name.startswith(("recv", "wait", "barrier")):
            if name.startswith("recv") and self._deliver is not None and given[0].dtype == torch.uint8:
                with _disable_current_modes():
                    self._deliver(given[0], args[3])
            return
        on_device = [tensor for tensor in given if isinstance(tensor, FakeTensor)]
        if not on_device:
            return
        self.tag(on_device, "communication", over=("other",))
        size, nodes = self._group(args)
        largest = max(tensor.numel() * tensor.itemsize for tensor in on_device)
        if name.strip("_").startswith(_SCATTERS) and self._gloo:
            self._series.append((*self._now[:-1], self._now[-1] + largest))
        kind, share = "point", 1.0
        for word, prefixes, factor in (
            ("reduce", _REDUCES, 2 * (size - 1) / size),
            ("scatter", _SCATTERS, (size - 1) / size),
            ("gather", _GATHERS, (size - 1) / size),
        ):
            if name.strip("_").startswith(prefixes):
                kind, share = word, factor
        if kind == "gather" and func.namespace == "_c10d_functional":
            largest *= size  # it is given what each rank has
        key = (kind, size, nodes)
        self._current.sent[key] = self._current.sent.get(key, 0.0) + largest * share
        self._current.messages[key] = self._current.messages.get(key, 0.0) + 1

    def _group(self, args: tuple[Any, ...]) -> tuple[int, int]:
        """How many ranks take part, on how many nodes."""
        for arg in args:
            if isinstance(arg, torch.ScriptObject):
                return self._span(dist.ProcessGroup.unbox(arg))
        names: list[Any] = [arg for arg in args if isinstance(arg, str)]
        resolve = dist.distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateImportUsage]  # as torch's
        return self._span(resolve(names[-1]))

    def _span(self, group: dist.ProcessGroup) -> tuple[int, int]:
        found = self._groups.get(group.group_name)
        if found is None:
            ranks = dist.get_process_group_ranks(group)
            found = len(ranks), len({rank // self._per_node for rank in ranks})
            self._groups[group.group_name] = found
        return found


_OTHER = KINDS.index("other")


def _attention(query: Tensor, key: Tensor, *more: Any, products: int = 2, **_: Any) -> int:
    """Of fused attention: queries with keys and scores with values, and in backward five such products; half of them
    where it is causal."""
    samples, heads, steps, width = query.shape
    whole = 2 * products * samples * heads * steps * key.shape[2] * width
    return whole // 2 if any(flag is True for flag in more) else whole


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, *more: Any, **_: Any) -> int:
    return _attention(query, key, *more, products=5)


#: torch's formulas, and those of the fused attention that stands for a GPU's.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _is_figure(result: Any) -> bool:
    """Whether a new tensor is one of integers that a program will read."""
    return isinstance(result, Tensor) and not result.is_floating_point() and result.numel() <= _HOST


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, which may be lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _storages(tensor: Tensor | None) -> list[torch.UntypedStorage]:
    if tensor is None:
        return []
    local = getattr(tensor, "_local_tensor", tensor)  # a DTensor's
    return [local.untyped_storage()]
