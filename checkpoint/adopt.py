"""Weights from elsewhere as a checkpoint of step 0, by the names and shapes of the model that is to have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.contracts import Run, Shard
from ..core.errors import JobError, Problem
from ..core.storage import Storage
from .foreign import Foreign
from .manifest import Manifest, folder_step
from .writer import PieceRecord, assign, commit, held, make_manifest, write_shard

if TYPE_CHECKING:
    from torch import Tensor

_MODEL = "model."
_SHOWN = 8


def match(foreign: Foreign, model: Mapping[str, Tensor], renames: Sequence[tuple[str, str]], source: str) -> Foreign:
    """``foreign`` by the names of ``model``, of which every tensor is there and has its shape.

    A name may have ``model.<part>.`` in front, or ``<part>.``, or nothing where the model has one part. A tied weight
    may be there by one of its names only.

    Args:
        model: what is wanted by fully qualified name; tied weights are one object.
        renames: beginnings of names and what they are replaced by; of each name, the first that fits.

    Raises:
        JobError: names are missing, unexpected or there twice, or shapes or kinds of numbers differ.
    """
    shapes, dtypes = foreign.shapes(), foreign.dtypes()
    places = {name: _place(_renamed(name, renames), model) for name in shapes}
    unexpected = [name for name, place in places.items() if place is None]
    found: dict[str, str] = {}
    problems: list[Problem] = []
    for name, place in places.items():
        if place is not None and place in found:
            problems.append(Problem(f"{name} and {found[place]} are both {place}", source))
        elif place is not None:
            found[place] = name
    sources = dict(found)
    for place, name in _tied(found, model):
        sources[place] = name
    missing = [place for place in model if place not in sources]
    for place, name in sources.items():
        wanted = tuple(model[place].shape)
        if shapes[name] != wanted:
            problems.append(Problem(f"{name} has the shape {list(shapes[name])}, {place} {list(wanted)}", source))
        elif dtypes[name].is_floating_point != model[place].dtype.is_floating_point:
            problems.append(Problem(f"{name} holds {dtypes[name]}, {place} {model[place].dtype}", source))
    del problems[_SHOWN:]
    hint = _rename_hint(unexpected, missing)
    if missing:
        problems.append(Problem(f"missing: {_list(missing)}", source, hint))
    if unexpected:
        problems.append(Problem(f"not in the model: {_list(unexpected)}", source, "" if missing else hint))
    if problems:
        raise JobError(*problems)
    ranks: list[Mapping[str, Shard | Run]] = []
    for rank in foreign.ranks:
        ranks.append({place: rank[name] for place, name in sources.items() if name in rank})
    return Foreign(foreign.what, tuple(ranks))


def adopt(storage: Storage, foreign: Foreign, *, job: dict[str, Any], source: str) -> Manifest:
    """Write ``foreign`` as the checkpoint of step 0: weights and buffers, no optimizer's state.

    Raises:
        JobError: there are checkpoints in the folder already, it cannot be written, or a dtype cannot be stored.
    """
    try:
        there = [name for name in storage.folders() if folder_step(name) is not None]
        if there:
            raise JobError(Problem(f"there is {there[0]} already", str(storage), "name another folder"))
        shares = assign([held(rank) for rank in foreign.ranks])
        records: list[PieceRecord] = []
        for number, (rank, mine) in enumerate(zip(foreign.ranks, shares, strict=True)):
            records += write_shard(storage, 0, number, len(foreign.ranks), rank, mine)
        manifest = make_manifest(
            records,
            step=0,
            total_steps=0,
            samples=0,
            world=len(foreign.ranks),
            job=job,
            extra={"imported": {"from": source, "as": foreign.what}},
        )
        commit(storage, manifest)
    except OSError as error:
        raise JobError(Problem(f"cannot be written: {error.strerror or error}", str(storage))) from error
    except TypeError as error:
        raise JobError(Problem(str(error), source)) from None
    return manifest


def _renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
    return next((new + name[len(old) :] for old, new in renames if name.startswith(old)), name)


def _place(name: str, model: Mapping[str, Tensor]) -> str | None:
    """The fully qualified name that ``name`` stands for."""
    parts = {fqn.split(".")[1] for fqn in model}
    choices = [name, _MODEL + name, *(f"{_MODEL}{part}.{name}" for part in parts if len(parts) == 1)]
    return next((choice for choice in choices if choice in model), None)


def _tied(found: Mapping[str, str], model: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The names of tied weights that are not there themselves, and what is there of them."""
    named = {id(model[place]): name for place, name in found.items()}
    for place, tensor in model.items():
        if place not in found and id(tensor) in named:
            yield place, named[id(tensor)]


def _rename_hint(unexpected: Sequence[str], missing: Sequence[str]) -> str:
    """The ``--rename`` that would help, if one beginning stands before all names, or is missing from all."""
    if not unexpected or not missing:
        return ""
    for place in missing:
        bare = [place.removeprefix(_MODEL), place.removeprefix(_MODEL).partition(".")[2]]
        for name in unexpected:
            for wanted in bare:
                if wanted and name.endswith(f".{wanted}"):
                    return f"did you mean --rename {name.removesuffix(wanted)}= ?"
                if wanted.endswith(f".{name}"):
                    return f"did you mean --rename ={wanted.removesuffix(name)} ?"
    return ""


def _list(names: Sequence[str]) -> str:
    more = f", … ({len(names):,} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
