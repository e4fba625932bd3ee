"""DeepSpeed's JSON as the values of a job, and what is left for a DeepSpeed configuration of the job's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core.zero import REFUSED, ZERO_KEYS, refused
from .settings import Imported, Said, Settings, is_on, reasons
from .training import is_auto, put_batch, put_clipping, put_offload, put_stage

_OPTIMIZERS = ("sgd", "adam", "adamw")
_PARAMETERS = ("lr", "betas", "eps", "weight_decay", "momentum", "nesterov")
_ZERO = "zero_optimization."
_WARMUP = 1000  # what DeepSpeed's schedulers take where nothing is said
_FLOOR = 0.0001

#: What DeepSpeed reads from its JSON beside what is taken below; a dot at the end stands for a section.
_FOR_DEEPSPEED = (
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_allgather"),
    *("prescale_gradients", "gradient_predivide_factor", "dataloader_drop_last", "comms_logger.", "flops_profiler."),
    *("aio.", "nebula.", "log_level", "disable_python_gc", "seq_parallel_communication_data_type"),
)
_WITHOUT = reasons(
    {
        "dltrain's loss scaling has these from torch": (
            *("fp16.loss_scale", "fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.hysteresis"),
            *("fp16.consecutive_hysteresis", "fp16.min_loss_scale"),
        ),
        "a job keeps weights, gradients and the optimizer in float32": (
            *("fp16.auto_cast", "fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"),
            *("bf16.bf16_optimizer_states", "bf16.immediate_grad_update", "bf16.check_overflow"),
            *("torch_autocast.lower_precision_safe_modules", "torch_autocast.dtype"),
        ),
        "dltrain's optimizers are torch's": (
            *("optimizer.legacy_fusion", "optimizer.params.torch_adam", "optimizer.params.adam_w_mode"),
            *("optimizer.params.bias_correction", "optimizer.params.amsgrad", "optimizer.params.set_grad_none"),
            *("optimizer.params.fused", "optimizer.params.foreach", "optimizer.params.dampening"),
        ),
        "the learning rate rises from zero, on a line": (
            "scheduler.params.warmup_min_lr",
            *("scheduler.params.warmup_min_ratio", "scheduler.params.warmup_type"),
        ),
        "dltrain says it to DeepSpeed itself": ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    }
)
_KNOWN = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer.type", "scheduler.type", "fp16.enabled", "bf16.enabled", *_FOR_DEEPSPEED),
    *(f"{_ZERO}{name}" for name in ZERO_KEYS),
)


def take_deepspeed(native: Mapping[str, Any], said: Mapping[str, Said], into: Imported) -> None:
    """Take the DeepSpeed configuration ``native``; ``said`` has its values by their dotted keys."""
    settings = Settings(said)
    stage = settings.take(f"{_ZERO}stage")
    if stage is not None and not is_auto(stage, into):
        put_stage(stage, into)
    put_offload(settings.take(f"{_ZERO}offload_optimizer.device"), settings.take(f"{_ZERO}offload_param.device"), into)
    put_clipping(settings.take("gradient_clipping"), into)
    put_batch(
        settings.take("train_batch_size"),
        settings.take("train_micro_batch_size_per_gpu"),
        settings.take("gradient_accumulation_steps"),
        into,
    )
    _precision(settings, into)
    _optimizer(settings, into)
    _scheduler(settings, into)
    _recompute(settings, into)
    _trackers(settings, into)
    _rest(settings, native, into)


def _precision(settings: Settings, into: Imported) -> None:
    for section, precision in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        said = settings.take(f"{section}.enabled")
        if said is None or is_auto(said, into):
            continue
        if is_on(said.value):
            into.put("train.precision", precision, said)
            into.leave(
                said, "DeepSpeed keeps weights in 16 bits, a job keeps them in float32 and computes under autocast"
            )
        elif into.get("train.precision") is None:
            into.put("train.precision", "fp32", said)
    autocast, kind = settings.take("torch_autocast.enabled"), settings.take("torch_autocast.dtype")
    if autocast is not None and is_on(autocast.value):
        half = kind is not None and str(kind.value).removeprefix("torch.") in ("float16", "fp16", "half")
        into.put("train.precision", "fp16" if half else "bf16", autocast)


def _optimizer(settings: Settings, into: Imported) -> None:
    said = settings.take("optimizer.type")
    if said is None:
        return
    kind = str(said.value).lower()
    if kind == "adam" and is_on(settings.value("optimizer.params.adam_w_mode", True)):
        kind = "adamw"  # DeepSpeed's Adam decouples the decay unless told not to
    if kind not in _OPTIMIZERS:
        why = f"train.optimizer has no '{said.value}': sgd, adam, adamw, adafactor and muon"
        for name in [name for name in settings.names() if name.startswith("optimizer.")]:
            left = settings.take(name)
            if left is not None:
                into.leave(left, why)
        return
    into.put("train.optimizer.name", kind, said)
    if kind == "sgd" and "optimizer.params.momentum" not in settings:
        into.put("train.optimizer.momentum", 0.0, said)
    for name in _PARAMETERS:
        value = settings.take(f"optimizer.params.{name}")
        if value is not None and not is_auto(value, into):
            into.put(f"train.optimizer.{name}", value.value, value)


def _scheduler(settings: Settings, into: Imported) -> None:
    said = settings.take("scheduler.type")
    if said is None:
        return
    names = {"WarmupLR": "constant", "WarmupCosineLR": "cosine"}
    if said.value in names:
        into.put("train.schedule.name", names[said.value], said)
    elif said.value == "WarmupDecayLR":
        into.leave(said, "no schedule falls on a line: cosine, step, one_cycle and plateau are there")
    else:
        for name in [name for name in settings.names() if name.startswith("scheduler.")]:
            left = settings.take(name)
            if left is not None:
                into.leave(left, "train.schedule has constant, cosine, step, one_cycle and plateau")
        return
    for name, key, default in (
        ("warmup_num_steps", "train.schedule.warmup_steps", _WARMUP),
        ("total_num_steps", "train.steps", None),
        ("warmup_max_lr", "train.optimizer.lr", None),
        ("cos_min_ratio", "train.schedule.floor", _FLOOR if said.value == "WarmupCosineLR" else None),
    ):
        value = settings.take(f"scheduler.params.{name}")
        if value is None and default is not None:
            into.put(key, default, said)
        elif value is not None and not is_auto(value, into):
            into.put(key, value.value, value)


def _recompute(settings: Settings, into: Imported) -> None:
    """A section on how to recompute is only there where the model does."""
    section = [name for name in settings.names() if name.startswith("activation_checkpointing.")]
    if section:
        said = settings.take(section[0])
        if said is not None:
            into.put("train.recompute", True, said)


def _trackers(settings: Settings, into: Imported) -> None:
    board, wandb = settings.take("tensorboard.enabled"), settings.take("wandb.enabled")
    if board is not None:
        into.put("tracking.tensorboard", is_on(board.value), board)
    if wandb is not None and not is_on(wandb.value):
        into.put("tracking.wandb.mode", "disabled", wandb)
    for name, key in (("wandb.project", "tracking.wandb.project"), ("wandb.team", "tracking.wandb.entity")):
        said = settings.take(name)
        if said is not None:
            into.put(key, said.value, said)


def _rest(settings: Settings, native: Mapping[str, Any], into: Imported) -> None:
    """What is DeepSpeed's own affair goes to it, unless it would break what a job promises."""
    stages = str(into.get("parallel.strategy", "ddp")).startswith("zero")
    harmful = dict(refused(native))
    for name in settings.left():
        guarded = next((key for key in REFUSED if name == key or name.startswith(f"{key}.")), None)
        if guarded is None and not _is_for_deepspeed(name):
            continue
        said = settings.take(name)
        if said is None or is_auto(said, into):
            continue
        if guarded is not None:
            into.leave(said, f"it {harmful[guarded]}" if guarded in harmful else "it is switched off")
        elif stages:
            into.native[name] = said
        else:
            into.leave(said, "it is for ZeRO's stages 1 to 3")
    settings.settle(into, _WITHOUT, _KNOWN)


def _is_for_deepspeed(name: str) -> bool:
    if name.startswith(_ZERO):
        return name.removeprefix(_ZERO).partition(".")[0] in ZERO_KEYS
    return any(name == key or (key.endswith(".") and name.startswith(key)) for key in _FOR_DEEPSPEED)
