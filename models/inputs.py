"""What recipes share about their inputs and arguments."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pydantic import BaseModel
from torch import Tensor


def as_sequence(x: Tensor) -> Tensor:
    """``x`` as a sequence of vectors, ``[samples, steps, features]``.

    An image ``[samples, channels, height, width]`` is read row by row: a step is one row of all channels. Series
    ``[samples, steps]`` have one feature.

    Raises:
        ValueError: ``x`` has another number of axes.
    """
    match x.dim():
        case 2:
            return x.unsqueeze(2)
        case 3:
            return x
        case 4:
            return x.transpose(1, 2).flatten(2)
        case _:
            raise ValueError(f"'x' of shape {list(x.shape)} is no sequence of vectors")


def refuse_idle_keys(config: BaseModel, task: str, keys: Mapping[str, Collection[str]]) -> None:
    """Refuse keys that were set but mean nothing for ``task``.

    Args:
        config: the arguments of a recipe.
        task: the task it is set to.
        keys: for each key that not all tasks use, the tasks that do.

    Raises:
        ValueError: naming the first such key.
    """
    for key, tasks in keys.items():
        if key in config.model_fields_set and task not in tasks:
            raise ValueError(f"'{key}' is of no use to the task '{task}', only to {' and '.join(sorted(tasks))}")
