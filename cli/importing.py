"""``dltrain checkpoint import``: weights from elsewhere, checked against the model of a job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.describe import tensor_bytes
from ..checkpoint.manifest import folder_name
from ..core.config import load_job
from ..core.errors import JobError, Problem
from ..core.storage import Storage
from ..models.registry import RECIPES
from .render import data_size
from .storage_options import options_for


def import_weights(
    source: str, target: str, job_file: str, renames: Sequence[str], key: str | None, options: Mapping[str, Any]
) -> None:
    """Write the weights in ``source`` as a checkpoint into ``target``, and say what it can be used for.

    Raises:
        JobError: the job is not valid, ``source`` cannot be read or does not fit its model, or ``target`` is taken.
    """
    pairs = [_pair(text) for text in renames]
    job = load_job(Path(job_file), (), {}, os.environ, recipes=RECIPES).job
    from ..checkpoint.adopt import adopt, match  # these take torch
    from ..checkpoint.foreign import open_foreign
    from ..training.recipes import outline

    foreign = match(open_foreign(source, key), outline(job), pairs, source)
    storage = Storage(target, options_for(target, options), where=target)
    manifest = adopt(storage, foreign, job=job.model_dump(mode="json"), source=source)
    size = data_size(tensor_bytes(manifest.tensors.values()))
    sys.stdout.write(f"{source} is {foreign.what}\n")
    sys.stdout.write(f"wrote {storage}/{folder_name(manifest.step)}: {len(manifest.tensors):,} tensors, {size}\n")


def _pair(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not separator:
        raise JobError(Problem(f"'{text}' renames nothing", "--rename", "write OLD=NEW; either may be empty"))
    return old, new
