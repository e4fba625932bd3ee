"""Weights that something else saved: state dicts, safetensors, DeepSpeed's ZeRO. Mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.contracts import Run, Shard
from ..core.errors import JobError, Problem
from .foreign_files import load_tensors
from .manifest import MANIFEST, folder_step
from .zero_folder import find_zero, open_zero

_NESTED = ("state_dict", "model_state_dict", "model", "module")
_SHOWN = 5


@dataclass(frozen=True)
class Foreign:
    """Weights and buffers by the names they were saved under.

    Attributes:
        what: what they were found in, in words.
        ranks: pieces that together are the tensors, as if so many ranks had held them.
    """

    what: str
    ranks: tuple[Mapping[str, Shard | Run], ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole tensors' shapes."""
        return {name: shard.shape for rank in self.ranks for name, shard in rank.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """The tensors' dtypes."""
        return {name: shard.data.dtype for rank in self.ranks for name, shard in rank.items()}


def open_foreign(source: str, key: str | None = None) -> Foreign:
    """Open a ``.pt`` or ``.pth`` file, a safetensors file, a folder of these with an index, or a ZeRO checkpoint.

    Args:
        key: which entry of a file's dictionary is the state dict, where there are several.

    Raises:
        JobError: there is nothing of that kind, it is damaged, or it holds more than tensors.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, source)
    if not path.is_file():
        raise JobError(Problem("there is no such file or folder", source, "it must be on this machine's file system"))
    if path.suffix == ".safetensors":
        return Foreign("a safetensors file", (_whole(_read_safetensors([path], source)),))
    found = load_tensors(path, source)
    return Foreign("a state dict", (_whole(_state_dict(found, key, source)),))


def _open_folder(path: Path, source: str) -> Foreign:
    if (path / MANIFEST).is_file() or any(folder_step(entry.name) is not None for entry in path.iterdir()):
        raise JobError(Problem("this is a dltrain checkpoint already", source))
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        return Foreign("sharded safetensors", (_whole(_read_safetensors(_shards(indices[0], source), source)),))
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return Foreign("a safetensors file", (_whole(_read_safetensors(files, source)),))
    zero = find_zero(path)
    if zero is not None:
        what, ranks = open_zero(zero, source)
        return Foreign(what, ranks)
    if files:
        raise JobError(Problem(f"{len(files)} safetensors files without an index", source, "name one of them"))
    hint = "a .pt, .pth or .safetensors file, a folder with model.safetensors, or a DeepSpeed checkpoint"
    raise JobError(Problem("nothing here that can be imported", source, hint))


def _shards(index: Path, source: str) -> list[Path]:
    """The files that an index names, all in its own folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise JobError(Problem(f"{index.name} is no index: {error}", source)) from None
    wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if wrong:
        raise JobError(Problem(f"{index.name} names {wrong[0]!r}, which is not in its folder", source))
    files = [index.parent / name for name in sorted(names)]
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        raise JobError(Problem(f"{index.name} names {gone[0]}, which is missing", source))
    return files


def _read_safetensors(files: Iterable[Path], source: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        except (SafetensorError, OSError) as error:
            raise JobError(Problem(f"{path.name} is no whole safetensors file: {error}", source)) from None
    return tensors


def _state_dict(found: dict[str, Any], key: str | None, source: str) -> dict[str, Tensor]:
    """The state dict in what a file holds: all of it, or one of its entries."""
    nested = {name: value for name, value in found.items() if _is_state_dict(value)}
    if key is not None:
        if key not in nested:
            raise JobError(
                Problem(f"there is no state dict '{key}' in the file", source, f"there are: {_list(nested)}")
            )
        return nested[key]
    if _is_state_dict(found):
        return found
    usual = [name for name in _NESTED if name in nested]
    if len(nested) == 1 or len(usual) == 1:
        return nested[(usual or list(nested))[0]]
    if nested:
        raise JobError(Problem("the file holds several state dicts", source, f"take one by '--key': {_list(nested)}"))
    raise JobError(Problem(f"the file holds no state dict, but: {_list(found)}", source))


def _is_state_dict(value: object) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    items = cast("Mapping[object, object]", value).items()
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items)


def _list(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Shard | Run]:
    return {name: Shard(tuple(t.shape), (0,) * t.dim(), t.detach()) for name, t in tensors.items()}
