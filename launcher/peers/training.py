"""What more than one peer says of training: the batch, accumulation, clipping, ZeRO."""

from __future__ import annotations

from typing import Any

from ...core.train import TrainSpec
from .settings import Imported, Said

_DEFAULT_BATCH: int = TrainSpec.model_fields["global_batch"].default


def put_accumulation(said: Said | None, into: Imported) -> None:
    """Take how many microbatches a rank has in a step: a job counts those of all ranks."""
    steps = _whole(said, into, "train.microbatches counts the microbatches of all ranks")
    if said is None or steps is None:
        return
    if steps == 1:
        into.put("train.microbatches", "auto", said)
    elif into.ranks is None:
        into.leave(said, "the files do not say how many ranks there are: train.microbatches is ranks × steps")
    elif steps * into.ranks > into.get("train.global_batch", _DEFAULT_BATCH):
        count = steps * into.ranks
        into.leave(said, f"set train.microbatches: {count} beside a train.global_batch of at least as many samples")
    else:
        into.put("train.microbatches", steps * into.ranks, said)


def put_batch(whole: Said | None, micro: Said | None, steps: Said | None, into: Imported) -> None:
    """Take the samples of a step from ``train_batch_size``, or from those of a microbatch and the number of ranks."""
    batch, samples, count = (_whole(said, into, "train.global_batch is a number") for said in (whole, micro, steps))
    if whole is not None and batch is not None:
        into.put("train.global_batch", batch, whole)
        if micro is not None and samples is not None and into.ranks is not None:
            into.put("train.microbatches", max(1, batch // samples), micro)
        elif micro is not None and samples is not None:
            into.leave(micro, "the files do not say how many ranks there are: train.microbatches says it for all")
        if steps is not None and count is not None and samples is not None:
            into.leave(steps, "it follows from train.global_batch, train.microbatches and the number of ranks")
        else:
            put_accumulation(steps, into)
    elif micro is not None and samples is not None:
        if into.ranks is None:
            into.leave(micro, "the files do not say how many ranks there are: train.global_batch is that of all ranks")
        else:
            into.put("train.global_batch", samples * (count or 1) * into.ranks, micro)
        put_accumulation(steps, into)
    else:
        put_accumulation(steps, into)


def put_stage(said: Said, into: Imported) -> None:
    """Take a ZeRO stage as the strategy."""
    strategies = {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3"}
    if str(said.value) in strategies:
        into.put("parallel.strategy", strategies[str(said.value)], said)
    else:
        into.leave(said, "ZeRO's stages are 0 to 3")


def put_offload(optimizer: Said | None, parameters: Said | None, into: Imported) -> None:
    """Take where the optimizer's state and the weights are kept, which a job says at once."""
    for said in (optimizer, parameters):
        if said is None:
            continue
        if said.value in ("cpu", "none"):
            if said.value == "cpu" or into.get("parallel.offload") is None:
                into.put("parallel.offload", said.value, said)
        else:
            into.leave(said, f"there is no offloading to {said.value}")


def put_clipping(said: Said | None, into: Imported) -> None:
    """Take the largest norm of gradients; 0 is none."""
    if said is None or is_auto(said, into):
        return
    try:
        norm = float(said.value)
    except (TypeError, ValueError):
        into.leave(said, "train.clip_norm is a number")
        return
    into.put("train.clip_norm", norm or None, said)


def is_auto(said: Said, into: Imported) -> bool:
    """Whether the value is Hugging Face's word for: as the training says."""
    if said.value == "auto":
        into.leave(said, "'auto' is what the job itself says")
    return said.value == "auto"


def _whole(said: Said | None, into: Imported, why: str) -> int | None:
    value: Any = None if said is None else said.value
    if said is None or is_auto(said, into):
        return None
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        into.leave(said, why)
        return None
    return value
