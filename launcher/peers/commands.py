"""Command lines of ``accelerate launch`` and ``deepspeed``: their options, and the script behind them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...core.errors import JobError, Problem, did_you_mean
from .settings import Imported, Said, Settings, reasons

#: Options that no value follows.
_ACCELERATE_FLAGS = (
    *("cpu", "multi_gpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "use_parallelism_config", "same_network"),
    *("module", "no_python", "quiet", "debug", "ipex", "use_xpu", "tpu", "enable_cpu_affinity", "use_cpu"),
    *("dynamo_use_fullgraph", "dynamo_use_dynamic", "dynamo_use_regional_compilation", "downcast_bf16"),
)
_DEEPSPEED_FLAGS = (
    *("module", "no_python", "no_local_rank", "no_ssh", "no_ssh_check", "force_multi", "save_pid", "quiet"),
    "bind_cores_to_rank",
)
_DEEPSPEED_OPTIONS = (
    *("hostfile", "include", "exclude", "num_nodes", "num_gpus", "master_port", "master_addr", "node_rank"),
    *("launcher", "launcher_args", "enable_each_rank_log", "autotuning", "bind_core_list", "ssh_port"),
    *("venv_script", "log_level"),
)
_DEEPSPEED_SHORT = {"H": "hostfile", "i": "include", "e": "exclude", "q": "quiet"}
_ACCELERATE_SHORT = {"m": "module", "q": "quiet", "t": "tee"}
_ALIASES = {"num_accelerators": "num_gpus"}
_HOSTS = "leave the hosts out of the hostfile"
_DEEPSPEED_WITHOUT = reasons(
    {
        "dltrain rendezvouses by itself": ("master_port", "master_addr"),
        "dltrain starts every node itself": ("node_rank", "no_ssh"),
        "dltrain submit reaches hosts by ssh, as ~/.ssh/config says": (
            *("launcher", "launcher_args", "ssh_port", "no_ssh_check", "force_multi", "venv_script"),
        ),
        _HOSTS: ("exclude",),
        "every rank's output is kept in the run directory": ("enable_each_rank_log", "log_level", "quiet"),
        "dltrain divides the cores among the ranks by itself": ("bind_cores_to_rank", "bind_core_list"),
        "dltrain plan compares strategies": ("autotuning",),
        "status and stop find the launch": ("save_pid",),
        "dltrain passes no --local_rank: the script reads LOCAL_RANK": ("no_local_rank",),
    }
)
#: Options of ``accelerate launch`` that choose a kind of training.
_KINDS = {
    "use_deepspeed": "DEEPSPEED",
    "use_fsdp": "FSDP",
    "use_megatron_lm": "MEGATRON_LM",
    "multi_gpu": "MULTI_GPU",
    "cpu": "MULTI_CPU",
}
#: What ``dltrain launch`` takes under the same name, as torchrun does.
_PASSED = ("max_restarts", "log_dir", "tee", "role", "module", "no_python")
_QUIETLY = {"quiet": "every rank's output is kept in the run directory", "use_parallelism_config": "its sizes say it"}


@dataclass
class Line:
    """A command line in pieces: options by name, and the script with its arguments."""

    options: dict[str, Said] = field(default_factory=dict[str, Said])
    target: tuple[str, ...] = ()


def parse_accelerate(words: Sequence[str]) -> Line:
    """Take ``accelerate launch OPTIONS script ARGUMENTS`` apart; its options are values of its configuration.

    Raises:
        JobError: it is no such line.
    """
    if list(words[:2]) != ["accelerate", "launch"]:
        raise JobError(Problem(f"'{' '.join(words[:2])}' launches nothing", hint="expected accelerate launch …"))
    line = _parse("accelerate launch", words[2:], _ACCELERATE_FLAGS, _ACCELERATE_SHORT, None)
    for name, kind in _KINDS.items():
        said = line.options.pop(name, None)
        if said is not None:
            line.options["distributed_type"] = Said(said.place, said.key, kind)
            if name == "cpu":
                line.options["use_cpu"] = said
    return line


def parse_deepspeed(words: Sequence[str]) -> Line:
    """Take ``deepspeed OPTIONS script ARGUMENTS`` apart.

    Raises:
        JobError: it is no such line.
    """
    return _parse("deepspeed", words[1:], _DEEPSPEED_FLAGS, _DEEPSPEED_SHORT, _DEEPSPEED_OPTIONS)


def take_launcher(options: Mapping[str, Said], into: Imported) -> None:
    """Take the options of ``deepspeed`` itself; the hostfile is read before.

    Raises:
        JobError: a number of nodes or of GPUs is none.
    """
    settings = Settings(options)
    settings.take("hostfile")
    for name, key in (("num_nodes", "resources.nodes"), ("num_gpus", "resources.nproc_per_node")):
        said = settings.take(name)
        if said is None or said.value == "-1":
            continue
        if not said.value.isdigit() or int(said.value) < 1:
            raise JobError(Problem(f"expected a whole number of at least 1, found '{said.value}'", str(said)))
        into.put(key, int(said.value), said)
    include = settings.take("include")
    if include is not None:
        _include(include, into)
    take_passed(settings, into)
    settings.settle(into, _DEEPSPEED_WITHOUT, _DEEPSPEED_OPTIONS)


def _include(said: Said, into: Imported) -> None:
    """Take GPUs of this machine, as ``localhost:0,1`` names them."""
    match = re.fullmatch(r"localhost:(\d+(?:,\d+)*)", said.value)
    if match is None:
        into.leave(said, _HOSTS)
        return
    into.put("resources.nproc_per_node", match[1].count(",") + 1, said)
    into.environment["CUDA_VISIBLE_DEVICES"] = match[1]


def take_passed(settings: Settings, into: Imported) -> None:
    """Take what ``dltrain launch`` takes under the same name."""
    for name in _PASSED:
        said = settings.take(name)
        if said is not None:
            option = "--" + name.replace("_", "-")
            into.options += (option,) if said.value is True else (f"{option}={said.value}",)
    for name, why in _QUIETLY.items():
        said = settings.take(name)
        if said is not None:
            into.leave(said, why)


def _parse(
    command: str, words: Sequence[str], flags: Sequence[str], short: Mapping[str, str], known: Sequence[str] | None
) -> Line:
    line, rest = Line(), list(words)
    while rest and rest[0].startswith("-") and rest[0] != "--":
        word, attached, value = rest.pop(0).partition("=")
        name = short.get(word[1:], "") if not word.startswith("--") else word[2:].replace("-", "_")
        name = _ALIASES.get(name, name)
        if not name or (known is not None and name not in known and name not in flags):
            choices = [f"--{choice}" for choice in (*(known or ()), *flags)]
            raise JobError(Problem(f"{command} has no option {word}", hint=did_you_mean(word, choices)))
        if name in flags:
            line.options[name] = Said(command, word, True)
            continue
        if not attached and not rest:
            raise JobError(Problem(f"{word} needs a value", command))
        line.options[name] = Said(command, word, value if attached else rest.pop(0))
    line.target = tuple(rest[1:] if rest[:1] == ["--"] else rest)
    if not line.target:
        raise JobError(Problem("no script follows the options", command, f"write {command} … train.py"))
    return line
