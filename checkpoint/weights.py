"""Which of a checkpoint's tensors are weights, and by which names they leave it. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..core.errors import JobError, Problem, did_you_mean
from .manifest import Manifest

_MODEL, _AVERAGE, _OPTIMIZER = "model.", "ema.", "optimizer."


@dataclass(frozen=True)
class Weights:
    """Weights and buffers to be taken out of a checkpoint.

    Attributes:
        tensors: by the name outside, the fully qualified name in the checkpoint.
        tied: by the name outside of a tensor that is another one's, the name of that one.
        averaged: whether averages stand in the place of the trained weights.
    """

    tensors: dict[str, str]
    tied: dict[str, str]
    averaged: bool

    def once(self) -> dict[str, str]:
        """``tensors`` without those that are another one's."""
        return {name: fqn for name, fqn in self.tensors.items() if name not in self.tied}


def select(manifest: Manifest, *, part: str | None = None, averaged: bool = False) -> Weights:
    """The weights and buffers of a checkpoint, or of one part of its recipe.

    Names lose ``model.``, and the part's name too where it is one part, so that the part's ``load_state_dict`` takes
    them.

    Args:
        averaged: the averages of the weights that have one (``train.ema``), and the other tensors as they are.

    Raises:
        JobError: the checkpoint has no such part, or no weights, or no averages.
    """
    where = f"step {manifest.step}"
    names = [fqn.removeprefix(_MODEL) for fqn in manifest.tensors if fqn.startswith(_MODEL)]
    parts = sorted({name.partition(".")[0] for name in names})
    if part is not None and part not in parts:
        raise JobError(Problem(f"the checkpoint has no part '{part}'", where, did_you_mean(part, parts)))
    if not names:
        raise JobError(Problem(f"the checkpoint holds no tensor under '{_MODEL}'", where))
    if averaged and not any(_AVERAGE + name in manifest.tensors for name in names):
        raise JobError(Problem("the checkpoint holds no averaged weights", where, "its job had no 'train.ema'"))
    kept = [name for name in names if part in (None, name.partition(".")[0])]
    single = part is not None or (len(parts) == 1 and all("." in name for name in names))
    outside = {name: name.partition(".")[2] if single else name for name in kept}
    aliases = _tied(manifest, kept)
    tensors: dict[str, str] = {}
    for name in kept:
        source = aliases.get(name, name)
        fqn = _AVERAGE + source if averaged else _MODEL + name
        tensors[outside[name]] = fqn if fqn in manifest.tensors else _MODEL + name
    return Weights(tensors, {outside[alias]: outside[name] for alias, name in aliases.items()}, averaged)


def has_averages(manifest: Manifest) -> bool:
    """Whether the checkpoint holds averaged weights."""
    return any(fqn.startswith(_AVERAGE) for fqn in manifest.tensors)


def _tied(manifest: Manifest, names: Collection[str]) -> dict[str, str]:
    """By the second name of a weight, its first.

    The two have the same bytes, and only the first has an optimizer's state or an average, since a parameter is trained
    once. Only matrices: the zeros of a bias are also those of a buffer that nothing has moved yet.
    """
    trained = {fqn.removeprefix(_AVERAGE) for fqn in manifest.tensors if fqn.startswith(_AVERAGE)}
    slots = (fqn.removeprefix(_OPTIMIZER) for fqn in manifest.tensors if fqn.startswith(_OPTIMIZER))
    trained |= {slot.rpartition(".")[0] for slot in slots}
    alike: dict[object, list[str]] = {}
    for name in names:
        entry = manifest.tensors[_MODEL + name]
        if len(entry.shape) > 1 and 0 not in entry.shape:
            hashes = frozenset((block.offset, block.shape, block.hash) for block in entry.blocks())
            alike.setdefault((entry.shape, entry.dtype, hashes), []).append(name)
    tied: dict[str, str] = {}
    for group in alike.values():
        first = [name for name in group if name in trained]
        if len(first) == 1:
            tied |= dict.fromkeys((name for name in group if name not in trained), first[0])
    return tied
