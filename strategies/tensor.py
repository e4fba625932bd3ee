"""Tensor parallelism: a part's matrices cut over the ranks of a tensor group, by its layout's rules (torch DTensor).

Shoeybi et al. 2019, "Megatron-LM". Values between a 'column' and the 'row' that it feeds are cut along their last axis,
all others are whole and the same on every rank of the group, and so is all randomness: it is keyed by step and
microbatch. Where values are cut, only a Dropout with a rule draws the same numbers as one process.

With sequence parallelism (Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models")
values from a 'row' to the next norm are cut along the sequence, axis 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as SplitAlong
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ..core.contracts import Layout, SequenceRule, TensorRule
from ..core.errors import JobError, Problem
from ..core.parallel import Parallel, nearest_divisor

Rule = TypeVar("Rule", TensorRule, SequenceRule)

_KINDS: Mapping[TensorRule, type[nn.Module]] = {
    "column": nn.Linear,
    "row": nn.Linear,
    "whole_column": nn.Linear,
    "embedding": nn.Embedding,
    "dropout": nn.Dropout,
}
_SEQUENCE_KINDS: Mapping[SequenceRule, type[nn.Module]] = {"norm": nn.Module, "dropout": nn.Dropout}


def cut(module: nn.Module, layout: Layout, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Cut ``module`` over the ranks of ``mesh`` in place. Weights that were shared between submodules stay shared."""
    shared = _shared(module)
    plan = {name: _style(rule, sequence) for name, rule, _ in _matches(module, layout.tensor)}
    if sequence:
        plan |= {name: _sequence_style(rule) for name, rule, _ in _matches(module, layout.sequence)}
    parallelize_module(module, mesh, plan)
    if sequence:
        for _, rule, submodule in _matches(module, layout.tensor):
            if rule in ("row", "embedding"):
                submodule.register_forward_pre_hook(partial(_check_length, mesh.size()))
    for first, *others in shared:
        owner, _, attribute = first.rpartition(".")
        weight = getattr(module.get_submodule(owner), attribute)
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, weight)


def check_cut(part: str, module: nn.Module, layout: Layout, parallel: Parallel) -> None:
    """Refuse tensor groups for ``module``, which may be on the meta device.

    Raises:
        JobError: a rule of the layout names no submodule of its kind, or the ranks cannot share evenly what they share.
    """
    _check_rules(part, module, layout.tensor, _KINDS)
    if parallel.sequence:
        _check_rules(part, module, layout.sequence, _SEQUENCE_KINDS)
    sizes = dict(layout.tensor_sizes) | {
        f"{what} of '{name}'": extent
        for name, rule, submodule in _matches(module, layout.tensor)
        for what, extent in _extent(rule, submodule)
    }
    common = math.gcd(*sizes.values())
    for what, extent in sizes.items():
        if extent % parallel.tensor:
            raise JobError(
                Problem(
                    f"{extent} {what} cannot be shared by {parallel.tensor} ranks",
                    "parallel.tensor",
                    f"{nearest_divisor(common, parallel.tensor)} would do",
                )
            )


def _check_rules(
    part: str, module: nn.Module, rules: Mapping[str, Rule], kinds: Mapping[Rule, type[nn.Module]]
) -> None:
    found = list(_matches(module, rules))
    for pattern, rule in rules.items():
        named = [submodule for name, _, submodule in found if _fits(name, pattern)]
        if not named or not all(isinstance(submodule, kinds[rule]) for submodule in named):
            what = f"the rule '{rule}' of part '{part}' is for a {kinds[rule].__name__}, and '{pattern}' names none"
            raise JobError(Problem(what, "recipe"))


def _matches(module: nn.Module, rules: Mapping[str, Rule]) -> Iterator[tuple[str, Rule, nn.Module]]:
    for name, submodule in module.named_modules():
        for pattern, rule in rules.items():
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


def _style(rule: TensorRule, sequence: bool) -> ParallelStyle:
    between = SplitAlong(1) if sequence else Replicate()
    match rule:
        case "column":
            return ColwiseParallel()
        case "row":
            return RowwiseParallel(output_layouts=between)
        case "whole_column":
            return ColwiseParallel(output_layouts=Replicate())
        case "embedding":
            return RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
        case "dropout":
            return _SlicedDropout(axis=-1)


def _sequence_style(rule: SequenceRule) -> ParallelStyle:
    match rule:
        case "norm":
            return _GatheredNorm()
        case "dropout":
            return _SlicedDropout(axis=1)


class _SlicedDropout(ParallelStyle):
    """Each rank draws the mask of the whole, and takes its slice along an axis."""

    def __init__(self, *, axis: int) -> None:
        self._axis = axis

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Dropout)
        axis, size, rank = self._axis, device_mesh.size(), device_mesh.get_local_rank()

        def forward(input: Tensor) -> Tensor:
            if not module.training or module.p == 0:
                return input
            shape = list(input.shape)
            width, shape[axis] = shape[axis], shape[axis] * size
            mask = nn.functional.dropout(torch.ones(shape, dtype=input.dtype, device=input.device), module.p)
            return input * mask.narrow(axis, rank * width, width)

        module.forward = forward
        return module


class _GatheredNorm(ParallelStyle):
    """A norm of each rank's slice of the sequence, whose results are gathered. Gradients of its weights are summed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        normed = SequenceParallel(use_local_output=False)._apply(module, device_mesh)  # pyright: ignore[reportPrivateUsage]  # how torch's own styles compose
        normed.register_forward_hook(_gather)
        return normed


def _check_length(size: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    length = inputs[0].shape[1]
    if length % size:
        raise ValueError(f"parallel.sequence: a sequence of {length} cannot be shared evenly by {size} ranks")


def _gather(module: nn.Module, inputs: tuple[Tensor, ...], output: DTensor) -> Tensor:
    return output.full_tensor()
