"""A model with fewer of its blocks: what a deep one takes follows from two shallow ones, as blocks are alike."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.contracts import Batch, Layout, Recipe

_WORTH = 10  # blocks; fewer are followed one by one


@dataclass(frozen=True)
class Stack:
    """A run of like blocks in a part: an ``nn.ModuleList`` or ``nn.Sequential`` whose members are units of the layout.

    Attributes:
        part: the part's name.
        owner: the container's name in the part.
        depth: how many blocks there are.
    """

    part: str
    owner: str
    depth: int


def find_stack(recipe: Recipe, modules: Mapping[str, nn.Module]) -> Stack | None:
    """The deepest run of like blocks, if there is one that is deep."""
    found: Stack | None = None
    for part, module in modules.items():
        units = set(recipe.layout(part).units)
        for owner, container in module.named_modules():
            if not isinstance(container, (nn.ModuleList, nn.Sequential)) or len(container) < _WORTH:
                continue
            if any(f"{owner}.{index}".lstrip(".") not in units for index in range(len(container))):
                continue
            if len({_form(block) for block in container}) == 1 and (found is None or len(container) > found.depth):
                found = Stack(part, owner, len(container))
    return found


@contextmanager
def cut_to(modules: Mapping[str, nn.Module], stack: Stack, depth: int) -> Generator[None]:
    """Within it the modules have the first ``depth`` blocks of the stack only."""
    container = modules[stack.part].get_submodule(stack.owner)
    rest = {name: container._modules.pop(name) for name in list(container._modules)[depth:]}
    try:
        yield
    finally:
        container._modules.update(rest)


def without_memory(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of modules that are on the meta device, on the CPU where tensors without memory are made."""
    made: dict[int, Any] = {}
    for module in modules.values():
        for tensor in (*module.parameters(), *module.buffers()):
            empty = torch.empty_like(tensor, device="cpu")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
    return {part: copy.deepcopy(module, dict(made)) for part, module in modules.items()}


class Shallow(Recipe):
    """A recipe whose layout does not name the blocks that are left out."""

    def __init__(self, recipe: Recipe, stack: Stack, depth: int) -> None:
        self._recipe, self._stack = recipe, stack
        dot = f"{stack.owner}." if stack.owner else ""
        self._gone = tuple(f"{dot}{index}" for index in range(depth, stack.depth))

    def parts(self) -> dict[str, nn.Module]:
        return self._recipe.parts()

    def layout(self, part: str) -> Layout:
        layout = self._recipe.layout(part)
        if part != self._stack.part:
            return layout
        units = tuple(name for name in layout.units if not self._is_gone(name))
        return replace(layout, units=units, pipeline=tuple(n for n in layout.pipeline if not self._is_gone(n)))

    def _is_gone(self, name: str) -> bool:
        return any(name == gone or name.startswith(f"{gone}.") for gone in self._gone)

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return self._recipe.loss(part, parts, batch)

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        return self._recipe.metrics(parts, batch)


def _form(block: nn.Module) -> tuple[object, ...]:
    """What makes two blocks alike."""
    kinds = tuple((name, type(module), module.extra_repr()) for name, module in block.named_modules())
    return kinds, tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())
