"""Training with the same bits on any number of ranks: what is added up over microbatches, along one binary tree.

The leaves are the microbatches of a step, a power of two of them, in their order. Each rank has a run of them, which is
a subtree, and the ranks' sums are the leaves of the rest. Whoever adds up what, the terms are paired in the same way.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.tree import tree_sum
from .spread import Spread


class Tree(Spread):
    """A copy of a part's module on every rank; gradients are tree sums over the step's microbatches, the same on all.

    A weight that a microbatch does not use has the gradient zero. Gradients are laid out in buckets, from the last
    parameter to the first. While the last microbatch's backward pass goes on, the ranks exchange those that are
    complete, all in the same order: each is sent everyone's sums of its share of a bucket, and sends out their sum.
    These are as many bytes as a ring's.
    """

    def __init__(self, module: nn.Module, *, ranks: int, bucket_mb: float) -> None:
        """Collective over ``ranks`` ranks: they take over the first one's weights and buffers."""
        self.module = self.trained = self.helping = module
        if ranks > 1:
            _take_over(module)
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        self._buckets = [_Bucket(some, ranks) for some in _in_buckets(reversed(weights), bucket_mb * 2**20)]
        self._exchange = _Exchange(ranks)
        self._index = 0  # of the microbatch, among this rank's of a step
        self._last = False
        self._started = 0  # so many buckets are exchanged, or being exchanged
        for bucket in self._buckets:
            for weight in bucket.weights:
                weight.register_post_accumulate_grad_hook(partial(self._arrived, bucket))

    @contextlib.contextmanager
    def reducing(self, last: bool) -> Generator[None]:
        self._last, self._started = last, 0
        for bucket in self._buckets:
            bucket.expect(self._index)
        yield
        if last:
            self._start(to=len(self._buckets))
            self._exchange.finish()
        else:
            for bucket in self._buckets:
                bucket.keep(self._index)
        self._index = 0 if last else self._index + 1

    def _arrived(self, bucket: _Bucket, weight: nn.Parameter) -> None:
        if weight not in bucket.missing:
            raise RuntimeError(
                "a weight's gradient arrived twice in one backward pass, which numerics: reproducible cannot add up; "
                "torch.utils.checkpoint does so with use_reentrant=True"
            )
        bucket.missing.remove(weight)
        if self._last and not bucket.missing:
            ready = self._started
            while ready < len(self._buckets) and not self._buckets[ready].missing:
                ready += 1
            self._start(to=ready)

    def _start(self, *, to: int) -> None:
        """Exchange the buckets before number ``to`` that are not under way yet."""
        for bucket in self._buckets[self._started : to]:
            self._exchange.start(bucket.total())
        self._started = to

    def rest(self) -> None:
        """Weights are whole everywhere."""


@torch.no_grad()
def _take_over(module: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0. Collective."""
    for tensor in (*module.parameters(), *module.buffers()):
        value = tensor.contiguous()
        dist.broadcast(value, 0)
        tensor.copy_(value)


def _in_buckets(weights: Iterable[nn.Parameter], size: float) -> Iterator[list[nn.Parameter]]:
    """``weights`` in runs of one dtype on one device, of ``size`` bytes or a little more."""
    bucket: list[nn.Parameter] = []
    held = 0
    for weight in weights:
        if bucket and (held >= size or (weight.dtype, weight.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, held = [], 0
        bucket.append(weight)
        held += weight.numel() * weight.element_size()
    if bucket:
        yield bucket


@dataclass(frozen=True)
class _Gradients:
    """One tensor for the gradients of a bucket's weights, and its views in their shapes."""

    flat: Tensor
    views: Sequence[Tensor]


class _Bucket:
    """Weights whose gradients lie one after the other in memory, and this rank's sums of them in a step."""

    def __init__(self, weights: Sequence[nn.Parameter], ranks: int) -> None:
        self.weights = weights
        self.missing: set[nn.Parameter] = set()  # whose gradients have not arrived in this microbatch
        self._sizes = [weight.numel() for weight in weights]
        self._ranks = ranks
        self._spare: list[_Gradients] = []
        self._sums: list[_Gradients] = []  # of this step's subtrees that are complete, the largest first
        self._now = self._empty()

    def expect(self, index: int) -> None:
        """Begin this rank's microbatch ``index`` of a step; autograd adds an odd one's gradients to those before."""
        self.missing = set(self.weights)
        if index % 2 == 0:
            self._now.flat.zero_()
            for weight, view in zip(self.weights, self._now.views, strict=True):
                weight.grad = view

    def keep(self, index: int) -> None:
        """Put aside what is complete with microbatch ``index``, which is not the last."""
        done = index + 1
        if done % 2 == 0:
            while done % 4 == 0:
                self._add_up()
                done //= 2
            self._sums.append(self._now)
            self._now = self._spare.pop() if self._spare else self._empty()

    def total(self) -> Tensor:
        """The sum over this rank's microbatches, in the weights' gradients, and zeros up to a multiple of ``ranks``."""
        while self._sums:
            self._add_up()
        return self._now.flat

    def _add_up(self) -> None:
        before = self._sums.pop()
        self._now.flat.add_(before.flat)
        self._spare.append(before)

    def _empty(self) -> _Gradients:
        size = sum(self._sizes)
        flat = self.weights[0].detach().new_empty(max(1, -(-size // self._ranks)) * self._ranks)
        views = flat[:size].split(self._sizes)
        return _Gradients(flat, [view.view_as(weight) for view, weight in zip(views, self.weights, strict=True)])


class _Exchange:
    """Sums over all ranks, in place, of one flat tensor after another; each has a multiple of ``ranks`` elements.

    Ranks send to each other from the tensor, and receive into it and one more of its size: gloo's own all-to-all and
    all-gather copy, and took half as long again as its ring.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._rank = dist.get_rank() if ranks > 1 else 0
        self._spare: list[Tensor] = []
        self._swaps = 0  # since the last time that all was finished
        self._scattering: deque[tuple[Sequence[Tensor], Sequence[Tensor], Tensor, list[dist.Work]]] = deque()
        self._gathering: list[dist.Work] = []

    def start(self, flat: Tensor) -> None:
        """Begin with ``flat``, which must not be touched until :meth:`finish`. Collective."""
        if self._ranks == 1:
            return
        received = self._memory(flat)
        shares, terms = flat.chunk(self._ranks), received[: flat.numel()].chunk(self._ranks)
        self._scattering.append((shares, terms, received, self._swap(shares, terms)))
        if len(self._scattering) > 1:  # not when it has arrived: operations have to begin in one order on all ranks
            self._gather()

    def finish(self) -> None:
        """Wait for all that was started."""
        while self._scattering:
            self._gather()
        for work in self._gathering:
            work.wait()
        self._gathering.clear()
        self._swaps = 0

    def _gather(self) -> None:
        shares, terms, received, works = self._scattering.popleft()
        for work in works:
            work.wait()
        own = shares[self._rank]
        terms = [own if rank == self._rank else term for rank, term in enumerate(terms)]
        while len(terms) > 1:  # a tree sum, in place
            for left, right in zip(terms[::2], terms[1::2], strict=True):
                left.add_(right)
            terms = terms[::2]
        if self._rank:
            own.copy_(terms[0])
        self._spare.append(received)
        self._gathering += self._swap([own] * self._ranks, shares)

    def _swap(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[dist.Work]:
        """Send every other rank its one of ``outgoing``, and receive ``incoming`` from them."""
        operations: list[dist.P2POp] = []
        for distance in range(1, self._ranks):
            to, source = (self._rank + distance) % self._ranks, (self._rank - distance) % self._ranks
            operations.append(dist.P2POp(dist.isend, outgoing[to], to, tag=self._swaps))
            operations.append(dist.P2POp(dist.irecv, incoming[source], source, tag=self._swaps))
        self._swaps += 1
        return dist.batch_isend_irecv(operations)

    def _memory(self, like: Tensor) -> Tensor:
        """As many elements as ``like`` has, or more."""
        for place, spare in enumerate(self._spare):
            if spare.numel() >= like.numel() and (spare.dtype, spare.device) == (like.dtype, like.device):
                return self._spare.pop(place)
        return torch.empty_like(like)


class Statistics:
    """The buffers of a recipe's parts, such as running averages, over a step's microbatches.

    Each microbatch begins with the same ones. After the step they are the mean of what its microbatches made of them,
    along the tree; those that are no floating-point numbers are what the first one made of them.
    """

    def __init__(self, modules: Iterable[nn.Module], *, ranks: int) -> None:
        self._modules, self._ranks = list(modules), ranks
        self._found: list[tuple[Tensor, Tensor]] = []

    @contextlib.contextmanager
    def of_microbatch(self) -> Generator[None]:
        """Around one forward and backward pass."""
        before = [buffer.clone() for buffer in self._buffers()]
        yield
        if before:
            numbers, others = self._by_kind()
            self._found.append((_flat(numbers, torch.float64), _flat(others, torch.int64)))
            for buffer, value in zip(self._buffers(), before, strict=True):
                buffer.copy_(value)

    def settle(self) -> None:
        """Take over what the microbatches of this step have found. Collective."""
        if not self._found:
            return
        total, first = tree_sum([numbers for numbers, _ in self._found]), self._found[0][1]
        if self._ranks > 1:
            everyones = total.new_empty(self._ranks, *total.shape)
            dist.all_gather_into_tensor(everyones.view(-1), total)
            dist.broadcast(first, 0)
            total = tree_sum(list(everyones))
        mean = total / (len(self._found) * self._ranks)
        for flat, buffers in zip((mean, first), self._by_kind(), strict=True):
            for buffer, value in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(value.view_as(buffer))
        self._found.clear()

    def _buffers(self) -> Iterator[Tensor]:
        return (buffer for module in self._modules for buffer in module.buffers())

    def _by_kind(self) -> tuple[list[Tensor], list[Tensor]]:
        """The floating-point numbers, and the others."""
        real = [torch.view_as_real(buffer) if buffer.is_complex() else buffer for buffer in self._buffers()]
        return [b for b in real if b.is_floating_point()], [b for b in real if not b.is_floating_point()]


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    flat = [tensor.to(dtype).flatten() for tensor in tensors]
    return torch.cat(flat) if flat else torch.empty(0, dtype=dtype)
