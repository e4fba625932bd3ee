"""Tensor parallelism: a part's matrices cut over the ranks of a tensor group, by its layout's rules (torch DTensor).

Shoeybi et al. 2019, "Megatron-LM". Values between a 'column' and the 'row' that it feeds are cut along their last axis,
all others are whole and the same on every rank of the group, and so is all randomness: it is keyed by step and
microbatch. Where values are cut, only a Dropout with a rule draws the same numbers as one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ..core.contracts import Layout, TensorRule
from ..core.errors import JobError, Problem
from ..core.parallel import nearest_divisor

_KINDS: Mapping[TensorRule, type[nn.Module]] = {
    "column": nn.Linear,
    "row": nn.Linear,
    "whole_column": nn.Linear,
    "embedding": nn.Embedding,
    "dropout": nn.Dropout,
}


def cut(module: nn.Module, layout: Layout, mesh: DeviceMesh) -> None:
    """Cut ``module`` over the ranks of ``mesh`` in place. Weights that were shared between submodules stay shared."""
    shared = _shared(module)
    parallelize_module(module, mesh, {name: _style(rule) for name, rule, _ in _matches(module, layout)})
    for first, *others in shared:
        owner, _, attribute = first.rpartition(".")
        weight = getattr(module.get_submodule(owner), attribute)
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, weight)


def check_cut(part: str, module: nn.Module, layout: Layout, size: int) -> None:
    """Refuse a tensor group of ``size`` ranks for ``module``, which may be on the meta device.

    Raises:
        JobError: a rule of the layout names no submodule of its kind, or ``size`` does not divide what it shares.
    """
    found = list(_matches(module, layout))
    for pattern, rule in layout.tensor.items():
        kinds = [type(submodule) for name, _, submodule in found if _fits(name, pattern)]
        if not kinds or not all(issubclass(kind, _KINDS[rule]) for kind in kinds):
            what = f"the rule '{rule}' of part '{part}' is for a {_KINDS[rule].__name__}, and '{pattern}' names none"
            raise JobError(Problem(what, "recipe"))
    sizes = dict(layout.tensor_sizes) | {
        f"{what} of '{name}'": extent for name, rule, submodule in found for what, extent in _extent(rule, submodule)
    }
    common = math.gcd(*sizes.values())
    for what, extent in sizes.items():
        if extent % size:
            raise JobError(
                Problem(
                    f"{extent} {what} cannot be shared by {size} ranks",
                    "parallel.tensor",
                    f"{nearest_divisor(common, size)} would do",
                )
            )


def _matches(module: nn.Module, layout: Layout) -> Iterator[tuple[str, TensorRule, nn.Module]]:
    for name, submodule in module.named_modules():
        for pattern, rule in layout.tensor.items():
            if _fits(name, pattern):
                yield name, rule, submodule
                break


def _fits(name: str, pattern: str) -> bool:
    """Component by component, so that ``*`` does not reach over a dot."""
    words, patterns = name.split("."), pattern.split(".")
    return len(words) == len(patterns) and all(map(fnmatchcase, words, patterns))


def _extent(rule: TensorRule, submodule: nn.Module) -> Iterator[tuple[str, int]]:
    match submodule:
        case nn.Linear() if rule == "row":
            yield "inputs", submodule.in_features
        case nn.Linear():
            yield "outputs", submodule.out_features
        case nn.Embedding():
            yield "entries", submodule.num_embeddings
        case _:
            return


def _shared(module: nn.Module) -> list[list[str]]:
    """The names of each weight that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def _style(rule: TensorRule) -> ParallelStyle:
    match rule:
        case "column":
            return ColwiseParallel()
        case "row":
            return RowwiseParallel()
        case "whole_column":
            return ColwiseParallel(output_layouts=Replicate())
        case "embedding":
            return RowwiseParallel(input_layouts=Replicate())
        case "dropout":
            return _SlicedDropout()


class _SlicedDropout(ParallelStyle):
    """Each rank draws the mask of the whole, and takes its slice along the last axis."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Dropout)
        size, rank = device_mesh.size(), device_mesh.get_local_rank()

        def forward(input: Tensor) -> Tensor:
            if not module.training or module.p == 0:
                return input
            width = input.shape[-1]
            whole = torch.ones((*input.shape[:-1], width * size), dtype=input.dtype, device=input.device)
            mask = nn.functional.dropout(whole, module.p)
            return input * mask.narrow(-1, rank * width, width)

        module.forward = forward
        return module
