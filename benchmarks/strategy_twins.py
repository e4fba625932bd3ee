"""The step that ``strategy_steps.py`` measures, written by hand on torch and DeepSpeed: nothing of dltrain's."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

#: One optimizer step, by its number; gives the mean loss of this rank's microbatches.
Step = Callable[[int], Tensor]
#: A step's microbatches on this rank: tokens, and the tokens that follow.
Data = Sequence[tuple[Tensor, Tensor]]

LR, DECAY, BETAS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1.0


def twin(strategy: str, model: nn.Module, data: Data, *, steps: int) -> Step:
    """A step of ``model`` under ``strategy`` at a rate that falls along a cosine over ``steps``."""
    match strategy:
        case "ddp" | "reproducible":
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
            return _torch(wrapped, data, steps, partial(_reducing, wrapped), _clip)
        case "fsdp":
            return _torch(model, data, steps, _sharded(model), _clip)
        case "tensor":
            _cut(model)
            return _torch(model, data, steps, lambda last: contextlib.nullcontext(), _clip_mixed)
        case _:
            return _zero(model, data, steps, stage=int(strategy[-1]))


def _torch(
    model: nn.Module,
    data: Data,
    steps: int,
    reducing: Callable[[bool], AbstractContextManager[object]],
    clip: Callable[[Iterable[nn.Parameter]], object],
) -> Step:
    optimizer = _adamw(model)

    def step(number: int) -> Tensor:
        _set_rate(optimizer, number, steps)
        optimizer.zero_grad()
        total = torch.zeros(())
        for index, (x, y) in enumerate(data):
            with reducing(index == len(data) - 1):
                loss = cross_entropy(model(x).flatten(0, 1), y.flatten()) / len(data)
                loss.backward()
            total += loss.detach()
        clip(model.parameters())
        optimizer.step()
        return total

    return step


def _zero(model: nn.Module, data: Data, steps: int, *, stage: int) -> Step:
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, and not be used
    optimizer = _adamw(model)
    config = {
        "train_micro_batch_size_per_gpu": len(data[0][0]),
        "gradient_accumulation_steps": len(data),
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 6_553_600, "allgather_bucket_size": 6_553_600},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(number: int) -> Tensor:
        _set_rate(engine.optimizer, number, steps)
        total = torch.zeros(())
        for x, y in data:
            loss = cross_entropy(engine(x).flatten(0, 1), y.flatten())
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(data)
        return total

    return step


def _reducing(wrapped: DistributedDataParallel, last: bool) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if last else wrapped.no_sync()


def _sharded(model: nn.Module) -> Callable[[bool], AbstractContextManager[object]]:
    for block in model.get_submodule("blocks").children():
        fully_shard(block)
    root = fully_shard(model)

    def reducing(last: bool) -> AbstractContextManager[object]:
        root.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    return reducing


def _cut(model: nn.Module) -> None:
    """Cut over all ranks after Megatron-LM. The embedding and the head share a matrix, cut by the vocabulary."""
    columns = ("attention.q", "attention.k", "attention.v", "feedforward.gate", "feedforward.up")
    plan = {f"blocks.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"blocks.*.{name}": RowwiseParallel() for name in ("attention.output", "feedforward.down")}
    plan["embedding"] = RowwiseParallel(input_layouts=Replicate())
    plan["head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    model.get_submodule("head").weight = model.get_submodule("embedding").weight


def _clip(parameters: Iterable[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(parameters, CLIP)


def _clip_mixed(parameters: Iterable[nn.Parameter]) -> None:
    """Clip by the norm of pieces and whole weights together; torch's own takes one kind or the other."""
    pieces: list[nn.Parameter] = []
    whole: list[nn.Parameter] = []
    for parameter in parameters:
        (pieces if isinstance(parameter, DTensor) else whole).append(parameter)
    cut, rest = (nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in (pieces, whole))
    assert isinstance(cut, DTensor)
    total = torch.hypot(cut.full_tensor(), rest)
    scale = torch.clamp(CLIP / (total + 1e-6), max=1.0)
    local = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in (*pieces, *whole)]
    torch._foreach_mul_([grad for grad in local if grad is not None], scale)


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, LR, betas=BETAS)


def _set_rate(optimizer: torch.optim.Optimizer, number: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * number / steps))
