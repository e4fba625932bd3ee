"""The variables by which Accelerate's launcher hands its configuration to ``Accelerator()`` in the script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from .settings import Said

#: Variables of the script by the setting that gives their value: always, under DeepSpeed, under FSDP.
_VARIABLES = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "dynamo_backend": "ACCELERATE_DYNAMO_BACKEND",
    "dynamo_mode": "ACCELERATE_DYNAMO_MODE",
    "dynamo_use_fullgraph": "ACCELERATE_DYNAMO_USE_FULLGRAPH",
    "dynamo_use_dynamic": "ACCELERATE_DYNAMO_USE_DYNAMIC",
    "dynamo_use_regional_compilation": "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
}
_DEEPSPEED = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "zero3_init_flag": "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    "zero3_save_16bit_model": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "deepspeed_moe_layer_cls_names": "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
}
_FSDP_NAMES = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
#: What its launcher sets where nothing is said.
_FSDP_DEFAULTS = {
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


def script_environment(named: Mapping[str, Said], kind: str) -> dict[str, str]:
    """The variables that a configuration comes to, for training of a ``kind``."""
    given = {name: said for name, said in named.items() if said.value is not None}
    found = {variable: given[name].value for name, variable in _VARIABLES.items() if name in given}
    if kind == "DEEPSPEED":
        fields = [name for name in given if given[name].key.startswith("deepspeed_config.")]
        fields += ["mixed_precision"] if "mixed_precision" in given else []
        found |= {"ACCELERATE_USE_DEEPSPEED": True, "ACCELERATE_CONFIG_DS_FIELDS": ",".join(fields)}
        found |= {variable: given[name].value for name, variable in _DEEPSPEED.items() if name in given}
    if kind == "FSDP":
        found |= {"ACCELERATE_USE_FSDP": True, **_FSDP_DEFAULTS}
        found |= {_FSDP_NAMES.get(n, n.upper()): s.value for n, s in given.items() if n.startswith("fsdp_")}
    if kind == "MEGATRON_LM":
        found["ACCELERATE_USE_MEGATRON_LM"] = True
        found |= {n.upper(): s.value for n, s in given.items() if n.startswith("megatron_lm_")}
    found |= {f"ACCELERATE_{n if n.startswith('fp8') else f'fp8_{n}'}".upper(): s.value for n, s in _fp8(given)}
    mesh = {n.upper(): s.value for n, s in given.items() if n.startswith("parallelism_config_")}
    found |= {"ACCELERATE_USE_PARALLELISM_CONFIG": True, **mesh} if mesh else {}
    return {variable: _text(value) for variable, value in found.items()}


def _fp8(given: Mapping[str, Said]) -> Iterator[tuple[str, Said]]:
    """Settings of 8-bit training by the names of their variables; one stands for three."""
    for name, said in given.items():
        if not said.key.startswith("fp8_config."):
            continue
        if name.removeprefix("fp8_") != "override_linear_precision":
            yield name, said
            continue
        words = _text(said.value).strip("()[]").split(",")
        for part, word in zip(("fprop", "dgrad", "wgrad"), words, strict=False):
            yield f"override_{part}", Said(said.place, said.key, str(word).strip())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, cast("list[Any]", value)))
    return str(value).lower() if isinstance(value, bool) else str(value)
