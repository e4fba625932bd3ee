"""DeepSpeed's configuration as the job determines it, and a native one checked against the job. No DeepSpeed, no torch.

ZeRO: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from .errors import JobError, Problem
from .job import Job
from .parallel import microbatches_per_step
from .suggest import similar_files
from .train import Optimizer

_VERSION = "0.19"  # whose insides strategies/deepspeed_state.py knows
_FILE = "parallel.deepspeed"
_HANDS_OFF = "leave it out of the file"

#: Keys of a configuration's section ``zero_optimization``, in the spelling of the files.
ZERO_KEYS = (
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
    *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights"),
    *("elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow", "sub_group_size", "cpu_offload_param"),
    *("cpu_offload_use_pin_memory", "cpu_offload", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold"),
    *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"),
    *("stage3_gather_fp16_weights_on_model_save", "ignore_unused_parameters", "legacy_stage1"),
    *("round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights"),
    *("zero_quantized_nontrainable_weights", "zero_quantized_gradients", "mics_shard_size"),
    *("mics_hierarchical_params_gather", "memory_efficient_linear", "pipeline_loading_checkpoint"),
    *("override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
    *("save_muon_momentum_buffer_in_memory", "leaf_module"),
)

# Keys that would break what a job promises, by what they would do.
_BY_HARM = {
    "changes what is computed": (
        *("amp", "communication_data_type", "compression_training", "curriculum_learning", "data_efficiency"),
        *("data_types", "eigenvalue", "elasticity", "gradient_allreduce_op", "managed_gradient_accumulation"),
        *("progressive_layer_drop", "sparse_attention", "sparse_gradients", "zero_optimization.zenflow"),
        *("zero_optimization.zero_quantized_gradients", "zero_optimization.zero_quantized_nontrainable_weights"),
        "zero_optimization.zero_quantized_weights",
    ),
    "spreads the model in a way that the job does not know of": (
        *("compile", "data_parallel_size", "expert_parallel", "hybrid_engine", "pipeline", "sequence_parallel_size"),
        *("tensor_parallel", "zero_optimization.mics_shard_size", "zero_optimization.zero_hpz_partition_size"),
    ),
    "keeps weights where checkpoints do not find them": (
        *("zero_optimization.cpu_offload", "zero_optimization.cpu_offload_params"),
        *("zero_optimization.elastic_checkpoint", "zero_optimization.offload_optimizer.nvme_path"),
        *("zero_optimization.offload_optimizer.ratio", "zero_optimization.offload_optimizer.super_offload"),
        *("zero_optimization.offload_param.nvme_path", "zero_optimization.round_robin_gradients"),
    ),
    "is done by dltrain": (
        *("autotuning", "checkpoint", "comet", "csv_monitor", "load_universal_checkpoint", "tensorboard", "wandb"),
        "activation_checkpointing",
    ),
}
REFUSED = {key: why for why, keys in _BY_HARM.items() for key in keys}


def check_zero(job: Job, world: int | None) -> Iterator[Problem]:
    """What is wrong with the job's use of DeepSpeed, on ``world`` ranks where that is known."""
    stage = job.parallel.zero_stage
    if not stage:
        return
    yield from _installed()
    if job.train.compile:
        yield Problem("DeepSpeed's hooks are not compiled", "train.compile", "ddp can be compiled")
    try:
        native = read_native(job)
    except JobError as error:
        yield from error.problems
        return
    yield from _contradictions(native, job, world)


def _installed() -> Iterator[Problem]:
    hint = "pip install 'dltrain[deepspeed]'"
    if importlib.util.find_spec("deepspeed") is None:
        yield Problem("DeepSpeed is not installed", "parallel.strategy", hint)
        return
    found = version("deepspeed")
    if not found.startswith(f"{_VERSION}."):
        yield Problem(f"DeepSpeed {found} is installed, {_VERSION} is needed", "parallel.strategy", hint)


def read_native(job: Job) -> dict[str, Any]:
    """The native configuration that the job names, without values of 'auto'; empty where it names none.

    Raises:
        JobError: there is no such file, or it is no JSON object.
    """
    if job.parallel.deepspeed is None:
        return {}
    path = Path(job.parallel.deepspeed)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(Problem(f"no such file: '{path}'", _FILE, similar_files(path, (".json",)))) from None
    except OSError as error:
        raise JobError(Problem(f"cannot read '{path}': {error.strerror}", _FILE)) from None
    except ValueError as error:
        raise JobError(Problem(f"'{path}' is no JSON: {error}", _FILE)) from None
    if not isinstance(value, dict):
        raise JobError(Problem(f"'{path}' holds no JSON object", _FILE))
    return without_auto(cast("dict[str, Any]", value))


def without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what is 'auto', which is Hugging Face's word for: as the training says."""
    return {
        key: without_auto(cast("dict[str, Any]", value)) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def settings(job: Job, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration for the job on ``world`` ranks: the native one under what the job determines.

    Raises:
        JobError: the native configuration cannot be read or contradicts the job, or the microbatches cannot be dealt
            to the ranks.
    """
    config = read_native(job)
    problems = list(_contradictions(config, job, world))
    if problems:
        raise JobError(*problems)
    for gone in ("optimizer", "scheduler"):  # the engine gets them ready made
        config.pop(gone, None)
    for key, (value, _) in _determined(job, world).items():
        section, _, name = key.rpartition(".")
        _section(config, section)[name] = value
    config.pop("train_batch_size")  # which need not be a multiple of the microbatches
    bucket = int(job.parallel.bucket_mb * 2**20) // 4  # in float32 elements; DeepSpeed's own default takes 2 GB
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        config["zero_optimization"].setdefault(key, bucket)
    return config


def _section(tree: dict[str, Any], path: str) -> dict[str, Any]:
    for name in filter(None, path.split(".")):
        tree = tree.setdefault(name, {})
    return tree


def _determined(job: Job, world: int | None) -> dict[str, tuple[Any, str]]:
    """What the job says of DeepSpeed's configuration: by key the value, and the job's key that it comes from."""
    train = job.train
    stage = job.parallel.zero_stage
    autocast, precision = train.precision != "fp32", f"train.precision '{train.precision}'"
    found: dict[str, tuple[Any, str]] = {
        "train_batch_size": (train.global_batch, "train.global_batch"),
        "gradient_clipping": (train.clip_norm or 0.0, "train.clip_norm"),
        "zero_allow_untested_optimizer": (True, "train.optimizer"),  # torch's are
        "zero_force_ds_cpu_optimizer": (False, "train.optimizer"),  # it would have to be compiled first
        "zero_optimization.stage": (stage, f"parallel.strategy '{job.parallel.strategy}'"),
        "zero_optimization.offload_optimizer.device": (job.parallel.offload, "parallel.offload"),
        "fp16.enabled": (False, precision),
        "bf16.enabled": (False, precision),  # it would keep the weights themselves in bfloat16
        "torch_autocast.enabled": (autocast, precision),
        "torch_autocast.dtype": ("float16" if train.precision == "fp16" else "bfloat16", precision),
        "torch_autocast.lower_precision_safe_modules": ([], precision),  # gradients are reduced in float32
    }
    if stage == 3:
        found["zero_optimization.offload_param.device"] = (job.parallel.offload, "parallel.offload")
    if world is not None:
        count = microbatches_per_step(
            train.microbatches, global_batch=train.global_batch, world=world, parallel=job.parallel
        )
        found["gradient_accumulation_steps"] = (count // world, f"train.microbatches on {world} ranks")
        samples = math.ceil(train.global_batch / count)
        found["train_micro_batch_size_per_gpu"] = (samples, "train.global_batch / train.microbatches")
    return found


def _contradictions(native: dict[str, Any], job: Job, world: int | None) -> Iterator[Problem]:
    """Keys of the native configuration that the job says otherwise, or that it cannot have."""
    for key, why in refused(native):
        yield Problem(f"{job.parallel.deepspeed}: {key} {why}", _FILE, _HANDS_OFF)
    try:
        determined = _determined(job, world)
    except JobError:  # the microbatches do not fit the world, which is told elsewhere
        determined = _determined(job, None)
    said = {key: _look_up(native, key) for key in determined}
    pairs = [(key, said[key], *determined[key]) for key in determined if said[key] is not None]
    pairs += list(_optimizer(native.get("optimizer"), job.train.optimizer))
    if native.get("scheduler"):
        pairs.append(("scheduler.type", _look_up(native, "scheduler.type"), job.train.schedule.name, "train.schedule"))
    if _look_up(native, "zero_optimization.compute_grad_norm") is False:
        what = f"{job.parallel.deepspeed}: zero_optimization.compute_grad_norm finds the steps that are not finite"
        yield Problem(what, _FILE, _HANDS_OFF)
    for key, theirs, ours, where in pairs:
        if theirs != ours:
            what = f"{job.parallel.deepspeed}: {key} is {json.dumps(theirs)}, the job's {where} says {json.dumps(ours)}"
            yield Problem(what, _FILE, f"make them agree, or {_HANDS_OFF}")


def refused(native: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of a native configuration that would break what a job promises, and what each would do."""
    yield from ((key, why) for key, why in REFUSED.items() if not _is_off(_look_up(native, key)))


def _is_off(value: Any) -> bool:
    """Whether a value is one of DeepSpeed's ways to say: not at all."""
    if isinstance(value, dict):
        section = cast("dict[str, Any]", value)
        return not section.get("enabled", bool(section))
    return value is None or (value is not True and value in (False, 0, 1, -1))


def _look_up(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = cast("Mapping[str, Any]", tree).get(name) if isinstance(tree, dict) else None
    return tree


def _optimizer(section: Any, job: Optimizer) -> Iterator[tuple[str, Any, Any, str]]:
    """The optimizer section's values beside the job's."""
    if not section:
        return
    params = cast("dict[str, Any]", _look_up(section, "params") or {})
    kind = str(_look_up(section, "type")).lower()
    if kind == "adam" and params.get("adam_w_mode", True):  # DeepSpeed's Adam decouples the decay unless told not to
        kind = "adamw"
    yield "optimizer.type", kind, job.name, "train.optimizer.name"
    for name in ("lr", "betas", "eps", "weight_decay", "momentum"):
        if name in params:
            yield f"optimizer.params.{name}", params[name], getattr(job, name), f"train.optimizer.{name}"
