"""The float32 weights in a checkpoint of DeepSpeed's ZeRO, where they lie: nothing is merged, and no DeepSpeed needed.

Every rank saved its part of flat buffers. Which elements are whose is DeepSpeed's ``utils/zero_to_fp32.py``; what that
script unpickles, this reads with inert stand-ins for DeepSpeed's own classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.contracts import Run, Shard
from ..core.errors import JobError, Problem
from .foreign_files import load_tensors

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


class _Inert:
    """Takes the place of an object whose state does not matter here."""

    def __init__(self, *_: object) -> None:
        pass


_STAND_INS: Mapping[str, type] = dict.fromkeys(
    (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    ),
    _Inert,
)

Pieces = tuple[Mapping[str, Shard | Run], ...]


def find_zero(folder: Path) -> Path | None:
    """The folder with the files of a ZeRO checkpoint: this one, or the newest below that ``latest`` names."""
    if any(_OPTIMIZER.fullmatch(entry.name) for entry in folder.iterdir()):
        return folder
    latest = folder / "latest"
    if not latest.is_file():
        return None
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    return folder / name if Path(name).name == name and (folder / name).is_dir() else None


def open_zero(folder: Path, source: str) -> tuple[str, Pieces]:
    """What the checkpoint is, in words, and each rank's pieces of the weights, with the buffers on the first rank.

    Raises:
        JobError: a rank's file is missing, it is of a kind that is not read, or what it holds does not add up.
    """
    files = _by_rank(folder, _OPTIMIZER, source)
    model_files = _by_rank(folder, _MODEL, source)
    optimizers = [load_tensors(path, source, _STAND_INS) for path in files]
    states = [_section(saved, "optimizer_state_dict", source) for saved in optimizers]
    models = [load_tensors(path, source, _STAND_INS) for path in model_files]
    stage3 = "fp32_flat_groups" in states[0]
    groups = "fp32_flat_groups" if stage3 else "single_partition_of_fp32_groups"
    count = states[0].get("partition_count")
    world = max(count) if isinstance(count, list) else count
    if world != len(files):
        raise JobError(Problem(f"{len(files)} of {world} ranks' optimizer states are here", source))
    if stage3 and len(models) != world:
        raise JobError(Problem(f"{len(models)} of {world} ranks' model states are here", source))
    try:
        flat = [[_tensor(group) for group in state[groups]] for state in states]
        ranks = _dealt(flat, models) if stage3 else _shared(flat, models[0], states[0])
        ranks[0] = {**_kept(models[0], all_of_it=not stage3), **ranks[0]}
        for alias, name in models[0].get("shared_params", {}).items():
            for rank in ranks:
                if name in rank:
                    rank[alias] = rank[name]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise JobError(Problem(f"this is no ZeRO checkpoint that can be read: {error!r}", source)) from None
    except ValueError as error:
        raise JobError(Problem(str(error), source)) from None
    stage = "3" if stage3 else "1 or 2"
    step = models[0].get("global_steps", "?")
    return f"a DeepSpeed ZeRO {stage} checkpoint of step {step} and {world} ranks", tuple(ranks)


def _by_rank(folder: Path, pattern: re.Pattern[str], source: str) -> list[Path]:
    matches = [match for entry in folder.iterdir() if (match := pattern.fullmatch(entry.name))]
    if any(int(match[2]) for match in matches):
        raise JobError(Problem("a ZeRO checkpoint with tensor parallelism is not read", source))
    if not matches:
        raise JobError(Problem(f"no file in {folder} is named like '{pattern.pattern}'", source))
    return [folder / match[0] for match in sorted(matches, key=lambda match: int(match[1] or 0))]


def _section(saved: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    if not isinstance(saved.get(name), dict):
        raise JobError(Problem(f"no '{name}' in a rank's file: this is no ZeRO checkpoint", source))
    return saved[name]


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"a {type(value).__name__} where a tensor should be")
    return value.detach()


def _shared(
    flat: Sequence[Sequence[Tensor]], model: Mapping[str, Any], state: Mapping[str, Any]
) -> list[dict[str, Shard | Run]]:
    """Stages 1 and 2: the ranks' parts of a group follow each other, and the parameters in them too, anywhere cut."""
    ranks: list[dict[str, Shard | Run]] = [{} for _ in flat]
    paddings = state.get("param_alignment_paddings") or [[0] * len(shapes) for shapes in model["param_shapes"]]
    for number, (shapes, padding) in enumerate(zip(model["param_shapes"], paddings, strict=True)):
        parts = [groups[number] for groups in flat]
        ends = list(accumulate(part.numel() for part in parts))
        begin = 0
        for (name, shape), gap in zip(shapes.items(), padding, strict=True):
            end = begin + prod(shape)
            for rank, (part, last) in enumerate(zip(parts, ends, strict=True)):
                lo, hi = max(begin, last - part.numel()), min(end, last)
                if lo < hi:
                    first = last - part.numel()
                    ranks[rank][name] = Run(tuple(shape), lo - begin, part[lo - first : hi - first])
            begin = end + gap
        unit = 2 * len(
            flat
        )  # groups are padded to multiples of it, and the padding is left out of some versions' files
        if ceil(begin / unit) != ceil(ends[-1] / unit):
            raise ValueError(f"group {number} has {ends[-1]} elements where its parameters have {begin}")
    return ranks


def _dealt(flat: Sequence[Sequence[Tensor]], models: Sequence[Mapping[str, Any]]) -> list[dict[str, Shard | Run]]:
    """Stage 3: every parameter is cut into equal parts, and a rank's parts follow each other over its groups."""
    shapes = {name: tuple(shape) for group in models[0]["param_shapes"] for name, shape in group.items()}
    parts = {name: ceil(prod(shape) / len(flat)) for name, shape in shapes.items()}
    here = sum(group.numel() for group in flat[0])
    if here != sum(parts.values()):
        raise ValueError(f"a rank has {here} elements where its parts of the parameters have {sum(parts.values())}")
    ranks: list[dict[str, Shard | Run]] = []
    for rank, groups in enumerate(flat):
        found: dict[str, Shard | Run] = {}
        begin = 0
        for name, shape in shapes.items():
            found |= _part(name, shape, _range(groups, begin, begin + parts[name]), rank, parts[name])
            begin += parts[name]
        frozen = models[rank].get("frozen_param_fragments") or {}
        for name, shape in (models[rank].get("frozen_param_shapes") or {}).items():
            fragment = _tensor(frozen[name])
            found |= _part(name, tuple(shape), fragment.reshape(-1), rank, ceil(prod(shape) / len(flat)))
        ranks.append(found)
    return ranks


def _part(name: str, shape: tuple[int, ...], part: Tensor, rank: int, size: int) -> Iterator[tuple[str, Run]]:
    """A rank's part of a parameter without the padding at its end; none of one that ends before."""
    start = rank * size
    count = min(size, prod(shape) - start)
    if count > 0:
        yield name, Run(shape, start, part[:count])


def _range(groups: Sequence[Tensor], begin: int, end: int) -> Tensor:
    """Elements of a rank's groups one after the other: a view, but where the range lies in two of them."""
    found: list[Tensor] = []
    first = 0
    for group in groups:
        lo, hi = max(begin, first), min(end, first + group.numel())
        if lo < hi:
            found.append(group[lo - first : hi - first])
        first += group.numel()
    return found[0] if len(found) == 1 else torch.cat(found) if found else groups[0][:0]


def _kept(model: Mapping[str, Any], *, all_of_it: bool) -> dict[str, Shard | Run]:
    """What rank 0 keeps whole: buffers, and with stages 1 and 2 frozen parameters."""
    module: Mapping[str, Tensor] = model["module"]
    names = module if all_of_it else [name for name in model["buffer_names"] if name in module]
    trained = {name for shapes in model["param_shapes"] for name in shapes}
    left_out = trained | set(model.get("shared_params", {}))
    return {
        name: Shard(tuple(module[name].shape), (0,) * module[name].dim(), _tensor(module[name]))
        for name in names
        if name not in left_out
    }
