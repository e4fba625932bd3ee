"""Accelerate's configuration, as ``accelerate config`` writes it or ``accelerate launch`` takes it as options.

Its launcher hands it to the script through the environment, where ``Accelerator()`` reads it; so does an import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...core.errors import JobError, Problem, did_you_mean
from .environment import script_environment
from .settings import Imported, Said, Settings, is_on, reasons
from .training import put_accumulation, put_clipping, put_offload, put_stage

_SECTIONS = {"fsdp_config": "FSDP", "deepspeed_config": "DEEPSPEED", "megatron_lm_config": "MEGATRON_LM"}
_DEVICES = ("MULTI_GPU", "MULTI_CPU", "NO", "FSDP", "DEEPSPEED", "MEGATRON_LM")
_PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
_BY_ENVIRONMENT = "a variable of the launch says it"
_SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")

_WITHOUT = reasons(
    {
        "dltrain starts every node itself": ("machine_rank",),
        "the cluster says where a job runs": ("compute_environment",),
        "dltrain rendezvouses by itself": (
            *("main_process_ip", "main_process_port", "rdzv_backend", "rdzv_conf", "same_network", "monitor_interval"),
        ),
        "dltrain divides the cores among the ranks by itself": ("enable_cpu_affinity",),
        "it is for TPUs, and dltrain has none": (
            *("main_training_function", "downcast_bf16", "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo"),
            *("tpu_env", "tpu_vm", "command_file", "commands"),
        ),
        "a recipe's layout says the units": (
            *("fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap", "fsdp_min_num_params"),
            "fsdp_ignored_modules",
        ),
        "FSDP2 does it by itself": (
            *("fsdp_backward_prefetch", "fsdp_backward_prefetch_policy", "fsdp_forward_prefetch"),
            *("fsdp_use_orig_params", "fsdp_version"),
        ),
        "dltrain deals a model to the ranks while it builds it": (
            *("fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states", "zero3_init_flag"),
        ),
        "checkpoints are the same under every strategy": ("fsdp_state_dict_type", "zero3_save_16bit_model"),
        "dltrain submit reaches hosts by ssh": ("deepspeed_multinode_launcher",),
        "leave the hosts out of the hostfile": ("deepspeed_exclusion_filter", "deepspeed_inclusion_filter"),
        "there is no offloading to NVMe": ("offload_optimizer_nvme_path", "offload_param_nvme_path"),
        "there is no expert parallelism": ("deepspeed_moe_layer_cls_names",),
        "there is no context parallelism in jobs": (
            *("parallelism_config_cp_size", "parallelism_config_cp_comm_strategy", "parallelism_config_cp_backend"),
            *("parallelism_config_sp_size", "parallelism_config_sp_backend"),
        ),
        "it follows from the number of ranks": ("parallelism_config_dp_shard_size",),
        "train.compile is torch.compile with its defaults": (
            *("dynamo_mode", "dynamo_use_fullgraph", "dynamo_use_dynamic", "dynamo_use_regional_compilation"),
        ),
        "there is no training in 8 bits": (
            *("backend", "fp8_backend", "fp8_format", "fp8_amax_history_len", "fp8_amax_compute_algorithm"),
            *("fp8_amax_compute_algo", "fp8_interval", "fp8_margin", "fp8_opt_level", "fp8_override_linear_precision"),
            *("fp8_use_autocast_during_eval", "fp8_use_te_autocast_during_eval"),
            *("amax_history_length", "amax_history_len", "amax_compute_algorithm", "amax_compute_algo"),
            *("interval", "margin", "opt_level", "override_linear_precision", "use_autocast_during_eval"),
        ),
        "ranks are not started through MPI": ("mpirun_hostfile", "mpirun_ccl"),
        "there is no IPEX": ("ipex", "use_xpu"),
        "Megatron-LM is not used": (*("megatron_lm_num_micro_batches", "megatron_lm_use_distributed_optimizer"),),
    }
)
_KNOWN = (
    *(
        "compute_environment",
        "distributed_type",
        "num_machines",
        "num_processes",
        "mixed_precision",
        "use_cpu",
        "debug",
    ),
    *("debug", "gpu_ids", "dynamo_backend", "zero_stage", "gradient_accumulation_steps", "gradient_clipping"),
    *("offload_optimizer_device", "offload_param_device", "fsdp_sharding_strategy", "fsdp_offload_params"),
)


def by_name(said: Mapping[str, Said]) -> dict[str, Said]:
    """A file's values by the names that they have as options of ``accelerate launch``."""
    named: dict[str, Said] = {}
    for key, value in said.items():
        section, _, name = key.rpartition(".")
        old = section == "fsdp_config" and "fsdp" not in name  # before 0.13
        named[f"fsdp_{name}" if old else name] = value
    return named


def take_accelerate(named: Mapping[str, Said], into: Imported) -> None:
    """Take an Accelerate configuration, by the names of the launcher's options.

    Raises:
        JobError: it is for SageMaker or for devices that dltrain cannot use, or its processes cannot be dealt to its
            machines.
    """
    settings = Settings(named)
    kind = _kind(settings)
    mine = _of_others(named, kind, into)
    settings = Settings(mine)
    _resources(settings, into, alone=kind == "NO")
    _precision(settings, into, zero=kind == "DEEPSPEED")
    {"FSDP": _fsdp, "DEEPSPEED": _zero, "MEGATRON_LM": _megatron}.get(kind, _plain)(settings, into)
    _compile(settings, into)
    into.environment |= script_environment(mine, kind)
    settings.settle(into, _WITHOUT, _KNOWN)


def _kind(settings: Settings) -> str:
    where = settings.take("compute_environment")
    if where is not None and where.value != "LOCAL_MACHINE":
        raise JobError(Problem(f"dltrain does not start jobs on {where.value}", str(where), "expected LOCAL_MACHINE"))
    kind = settings.take("distributed_type")
    if kind is None:
        return "MULTI_GPU"
    if kind.value not in _DEVICES:
        what = f"dltrain cannot train as '{kind.value}'"
        raise JobError(Problem(what, str(kind), did_you_mean(str(kind.value), _DEVICES)))
    return str(kind.value)


def _of_others(named: Mapping[str, Said], kind: str, into: Imported) -> dict[str, Said]:
    """The values without those of sections that Accelerate does not read for this kind of training."""
    mine = dict(named)
    for name, said in named.items():
        owner = _SECTIONS.get(said.key.partition(".")[0], kind)
        if owner != kind:
            into.leave(mine.pop(name), f"Accelerate reads it for distributed_type {owner} only")
    return mine


def _resources(settings: Settings, into: Imported, *, alone: bool) -> None:
    machines, processes = settings.take("num_machines"), settings.take("num_processes")
    nodes = 1 if machines is None else _count(machines)
    if machines is not None:
        into.put("resources.nodes", nodes, machines)
    if processes is not None and processes.value != -1:
        total = 1 if alone else _count(processes)
        if total % nodes:
            what = f"{total} processes cannot be dealt evenly to {nodes} machines"
            raise JobError(Problem(what, str(processes), f"{total // nodes * nodes or nodes} would do"))
        into.put("resources.nproc_per_node", total // nodes, processes)
    threads = settings.take("num_cpu_threads_per_process")
    if threads is not None:
        into.put("resources.cpus_per_rank", _count(threads), threads)
        into.environment["OMP_NUM_THREADS"] = str(threads.value)
    for name, variable in (("use_cpu", "ACCELERATE_USE_CPU"), ("debug", "ACCELERATE_DEBUG_MODE")):
        said = settings.take(name)
        if said is not None and is_on(said.value):
            into.environment[variable] = "true"
            into.leave(said, _BY_ENVIRONMENT)
        elif said is not None:
            into.leave(said, "it is off")
    devices = settings.take("gpu_ids")
    if devices is not None and devices.value == "all":
        into.leave(devices, "ranks get the node's GPUs, one each")
    elif devices is not None:
        into.environment["CUDA_VISIBLE_DEVICES"] = str(devices.value)
        into.leave(devices, _BY_ENVIRONMENT)


def _count(said: Said) -> int:
    try:
        number = int(said.value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise JobError(Problem(f"expected a whole number of at least 1, found {said.value!r}", str(said)))
    return number


def _precision(settings: Settings, into: Imported, *, zero: bool) -> None:
    said = settings.take("mixed_precision") or settings.take("fp16")
    if said is None:
        return
    word = str(said.value).lower()
    word = {"true": "fp16", "false": "no"}.get(word, word)
    if word in _PRECISIONS:
        into.put("train.precision", _PRECISIONS[word], said)
    else:
        into.leave(said, "there is no training in 8 bits" if word == "fp8" else "train.precision is fp32, bf16 or fp16")
    if zero and word in ("fp16", "bf16"):
        into.leave(said, "DeepSpeed keeps weights in 16 bits, a job keeps them in float32 and computes under autocast")


def _plain(settings: Settings, into: Imported) -> None:
    kind = settings.take("distributed_type")
    if kind is not None:
        into.put("parallel.strategy", "ddp", kind)
    _accumulate(settings, into)


def _fsdp(settings: Settings, into: Imported) -> None:
    kind = settings.take("distributed_type")
    assert kind is not None
    into.put("parallel.strategy", "fsdp", kind)
    for name in ("fsdp_sharding_strategy", "fsdp_reshard_after_forward"):
        said = settings.take(name)
        if said is not None:
            _sharding(said, into)
    offload = settings.take("fsdp_offload_params")
    if offload is not None:
        into.put("parallel.offload", "cpu" if is_on(offload.value) else "none", offload)
    recompute = settings.take("fsdp_activation_checkpointing")
    if recompute is not None:
        into.put("train.recompute", is_on(recompute.value), recompute)
    mesh = {
        "parallelism_config_tp_size": "parallel.tensor",
        "parallelism_config_dp_replicate_size": "parallel.replicas",
    }
    _put_each(settings, into, mesh, _count)
    _accumulate(settings, into)


def _sharding(said: Said, into: Imported) -> None:
    """Either a strategy by name or number, as FSDP 1 has them, or whether weights are freed after forward."""
    word = str(said.value).upper()
    if word.isdigit() and 1 <= int(word) <= len(_SHARDING):
        word = _SHARDING[int(word) - 1]
    if word in ("TRUE", "FALSE"):
        into.put("parallel.reshard", word == "TRUE", said)
    elif word == "NO_SHARD":
        into.put("parallel.strategy", "ddp", said)
    elif word in _SHARDING:
        into.put("parallel.reshard", word in ("FULL_SHARD", "HYBRID_SHARD"), said)
        if word.startswith("HYBRID"):
            into.put("parallel.replicas", into.get("resources.nodes", 1), said)
    else:
        into.leave(said, f"dltrain knows {', '.join(_SHARDING)}")


def _zero(settings: Settings, into: Imported) -> None:
    kind, stage = settings.take("distributed_type"), settings.take("zero_stage")
    assert kind is not None
    if stage is not None:
        put_stage(stage, into)
    elif settings.take("deepspeed_config_file") is None:
        into.put("parallel.strategy", "zero2", kind)  # Accelerate's own default
    put_offload(settings.take("offload_optimizer_device"), settings.take("offload_param_device"), into)
    put_clipping(settings.take("gradient_clipping"), into)
    for name in ("deepspeed_hostfile", "deepspeed_config_file"):  # read beside this one
        settings.take(name)
    _accumulate(settings, into)


def _megatron(settings: Settings, into: Imported) -> None:
    mesh = {"megatron_lm_tp_degree": "parallel.tensor", "megatron_lm_pp_degree": "parallel.pipeline"}
    _put_each(settings, into, mesh, _count)
    switches = {
        "megatron_lm_sequence_parallelism": "parallel.sequence",
        "megatron_lm_recompute_activations": "train.recompute",
    }
    _put_each(settings, into, switches, lambda said: is_on(said.value))
    put_clipping(settings.take("megatron_lm_gradient_clipping"), into)
    _accumulate(settings, into)


def _put_each(settings: Settings, into: Imported, keys: Mapping[str, str], value: Callable[[Said], Any]) -> None:
    """Take settings over as the job's ``keys``, by their names, those that there are."""
    for name, key in keys.items():
        said = settings.take(name)
        if said is not None:
            into.put(key, value(said), said)


def _accumulate(settings: Settings, into: Imported) -> None:
    put_accumulation(settings.take("gradient_accumulation_steps"), into)


def _compile(settings: Settings, into: Imported) -> None:
    said = settings.take("dynamo_backend")
    if said is None:
        return
    word = str(said.value).lower()
    zero = str(into.get("parallel.strategy", "")).startswith("zero")
    if word in ("no", "inductor") and not (zero and word == "inductor"):
        into.put("train.compile", word == "inductor", said)
    else:
        into.leave(said, "DeepSpeed's hooks are not compiled" if zero else "torch.compile is used with inductor")
