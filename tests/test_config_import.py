"""What Accelerate and DeepSpeed are told, turned into a job and a command, which then runs the user's script."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command import Done, dltrain
from dltrain.core.document import read_document
from dltrain.core.zero import ZERO_KEYS
from dltrain.launcher.peers.settings import flatten
from launching import BIN, Sandbox

PROGRAMS = Path(__file__).parent / "programs"

# What accelerate config asks and writes, with one key of a version to come.
FSDP = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
dynamo_config:
  dynamo_backend: INDUCTOR
  dynamo_mode: default
enable_cpu_affinity: false
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_offload_params: true
  fsdp_reshard_after_forward: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_transformer_layer_cls_to_wrap: BertLayer
  fsdp_version: 2
  fsdp_of_tomorrow: 7
machine_rank: 0
main_process_ip: 10.0.0.1
main_process_port: 29500
main_training_function: main
mixed_precision: bf16
num_machines: 2
num_proceses: 8
num_processes: 16
rdzv_backend: static
same_network: true
tpu_env: []
use_cpu: false
"""
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "steps_per_print": 50,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": 500000,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "stage3_max_live_parameters": 1e6,
        "zero_quantized_weights": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "eps": "auto"}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 10, "total_num_steps": 500}},
    "activation_checkpointing": {"partition_activations": True},
    "wall_clock_brakedown": False,
}


def resolved(path: str) -> dict[str, Any]:
    """The job of a file, which has to be one that could be launched."""
    shown = dltrain("config", "show", path, "--json")
    assert shown.code == 0, shown.err
    return json.loads(shown.out)["job"]


def command_in(text: str) -> str:
    """The command for a script, as the comments of a job file have it."""
    block = text.partition("nodes and ranks:\n")[2].partition("\n#\n")[0]
    return "\n".join(line.removeprefix("#   ") for line in block.splitlines())


def unmentioned(file: str, text: str) -> list[str]:
    """Keys of a file that ``text`` says nothing of, by place and name."""
    said = flatten(read_document(Path(file)), file)
    return [str(one) for one in said.values() if str(one) not in text]


def test_accelerates_fsdp_becomes_a_job_and_its_launchers_variables(empty_folder: Path) -> None:
    Path("acc.yaml").write_text(FSDP, encoding="utf-8")
    done = dltrain("config", "import", "acc.yaml", "-o", "job.yaml")
    assert done.code == 0, done.err
    job = resolved("job.yaml")
    assert job["resources"] | {"nodes": 2, "nproc_per_node": 8} == job["resources"]
    assert job["parallel"] | {"strategy": "fsdp", "reshard": False, "offload": "cpu"} == job["parallel"]
    assert (job["train"]["precision"], job["train"]["recompute"], job["train"]["compile"]) == ("bf16", True, True)
    text = Path("job.yaml").read_text(encoding="utf-8")
    assert unmentioned("acc.yaml", text) == []
    assert re.search(r"strategy: fsdp +# acc.yaml:3: distributed_type: FSDP", text)
    for told in (text, done.out):
        assert "acc.yaml:17: fsdp_config.fsdp_of_tomorrow 7" in told
        assert "acc.yaml:24: num_proceses 8 (did you mean 'num_processes'?)" in told
        assert told.partition("not known to dltrain")[2].count("acc.yaml:") == 2
    command = command_in(text)
    assert command.splitlines()[-1].strip() == "dltrain launch --address auto --nodes 2 --nproc-per-node 8 train.py"
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP=BertLayer" in command
    assert "FSDP_RESHARD_AFTER_FORWARD=false" in command
    again = dltrain("config", "import", "acc.yaml", "-o", "job.yaml")
    assert again.code == 2
    assert "--force replaces it" in again.err


def test_deepspeeds_json_and_hostfile_become_a_job_and_what_is_left_a_json(empty_folder: Path) -> None:
    Path("ds.json").write_text(json.dumps(DEEPSPEED, indent=2), encoding="utf-8")
    Path("hosts").write_text("node1 slots=4\nnode2 slots=4\n", encoding="utf-8")
    done = dltrain("config", "import", "hosts", "ds.json", "-o", "job.yaml")
    assert done.code == 0, done.err
    job, text = resolved("job.yaml"), Path("job.yaml").read_text(encoding="utf-8")
    assert job["resources"] | {"nodes": 2, "nproc_per_node": 4} == job["resources"]
    assert job["parallel"] | {"strategy": "zero3", "offload": "cpu"} == job["parallel"]
    train = job["train"]
    assert (train["global_batch"], train["microbatches"], train["clip_norm"]) == (64, 16, 1.0)
    assert (train["precision"], train["recompute"], train["steps"]) == ("bf16", True, 500)
    optimizer = {"name": "adamw", "lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}
    assert train["optimizer"] | optimizer == train["optimizer"]
    assert train["schedule"] | {"name": "cosine", "warmup_steps": 10, "floor": 0.0001} == train["schedule"]
    native = json.loads(Path(job["parallel"]["deepspeed"]).read_text(encoding="utf-8"))
    assert native == {
        "steps_per_print": 50,
        "zero_optimization": {
            "overlap_comm": True,
            "reduce_bucket_size": 500000,
            "offload_optimizer": {"pin_memory": True},
            "stage3_max_live_parameters": 1e6,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }
    kept = {"steps_per_print", "overlap_comm", "reduce_bucket_size", "pin_memory", "max_live", "gather_16bit"}
    assert [key for key in unmentioned("ds.json", text) if not any(word in key for word in kept)] == []
    assert "wall_clock_brakedown false (did you mean 'wall_clock_breakdown'?)" in text
    assert command_in(text) == "dltrain submit --cluster hosts --nodes 2 --nproc-per-node 4 train.py"
    printed = dltrain("config", "import", "hosts", "ds.json")
    assert printed.code == 0, printed.err
    assert unmentioned("ds.json", printed.out) == []


COMMANDS = {
    "deepspeed --hostfile=hosts --num_nodes 1 --num_gpus 2 --module pkg.train --lr 3 --deepspeed_config ds.json": (
        "dltrain submit --cluster hosts --nproc-per-node 2 --module pkg.train --lr 3 --deepspeed_config ds.json"
    ),
    "deepspeed --include localhost:1,3 train.py": "dltrain launch --nproc-per-node 2 train.py",
    "deepspeed --num_gpus=4 --master_port 29501 train.py": "dltrain launch --nproc-per-node 4 train.py",
    "accelerate launch --config_file acc.yaml --num_processes 4 --num-machines=1 --max_restarts 2 train.py -x 1": (
        "dltrain launch --nproc-per-node 4 --max-restarts=2 train.py -x 1"
    ),
    "accelerate launch --cpu --num_processes 2 --mixed_precision bf16 train.py": (
        "dltrain launch --nproc-per-node 2 train.py"
    ),
}


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_become_launches_of_the_same_script(line: str, empty_folder: Path) -> None:
    Path("acc.yaml").write_text(FSDP, encoding="utf-8")
    Path("ds.json").write_text(json.dumps(DEEPSPEED), encoding="utf-8")
    Path("hosts").write_text("node1 slots=8\nnode2 slots=8\n", encoding="utf-8")
    done = dltrain("config", "import", "--", *line.split())
    assert done.code == 0, done.err
    assert command_in(done.out).splitlines()[-1].strip() == COMMANDS[line]
    assert ("CUDA_VISIBLE_DEVICES=1,3" in done.out) == ("localhost:1,3" in line)
    if line.startswith("deepspeed"):
        assert ("strategy: zero3" in done.out) == ("ds.json" in line)


REFUSED = {
    "distributed_type: NO\ncompute_environment: AMAZON_SAGEMAKER\n": "f.yaml:2: compute_environment: dltrain does not",
    "distributed_type: XLA\n": "f.yaml:1: distributed_type: dltrain cannot train as 'XLA'",
    "distributed_type: FSPD\n": "did you mean 'FSDP'?",
    "num_machines: 3\nnum_processes: 8\n": "f.yaml:2: num_processes: 8 processes cannot be dealt evenly to 3 machines",
    "num_processes: many\n": "f.yaml:1: num_processes: expected a whole number of at least 1, found 'many'",
    "replicas: 3\n": "f.yaml: neither Accelerate's configuration nor DeepSpeed's",
    "- 1\n": "f.yaml: neither Accelerate's configuration nor DeepSpeed's",
    "num_processes: [\n": "f.yaml:2:1: not valid YAML",
    "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: gone.json}\n": "no such file: 'gone.json'",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_meant_is_refused_by_file_and_key(text: str, empty_folder: Path) -> None:
    Path("f.yaml").write_text(text, encoding="utf-8")
    refused = dltrain("config", "import", "f.yaml")
    assert refused.code == 2
    assert REFUSED[text] in " ".join(refused.err.split())
    assert not refused.out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("gone.yaml", "no such file"),
        ("gone", "cannot be read"),
        ("-- torchrun train.py", "write dltrain launch in torchrun's place"),
        ("-- deepspeed --num_gpu 2 train.py", "did you mean '--num_gpus'?"),
        ("-- deepspeed --num_gpus 2", "no script follows the options"),
        ("-- accelerate config", "expected accelerate launch"),
    ],
)
def test_what_is_no_file_and_no_launch_is_refused(line: str, says: str, empty_folder: Path) -> None:
    refused = dltrain("config", "import", *line.split())
    assert refused.code == 2
    assert says in " ".join(refused.err.split())


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("fsdp_sharding_strategy: SHARD_GRAD_OP", {"strategy": "fsdp", "reshard": False}),
        ("fsdp_sharding_strategy: 1", {"strategy": "fsdp", "reshard": True}),
        ("sharding_strategy: HYBRID_SHARD", {"strategy": "fsdp", "reshard": True, "replicas": 2}),
        ("{fsdp_sharding_strategy: NO_SHARD, fsdp_offload_params: true}", {"strategy": "ddp", "offload": "none"}),
    ],
)
def test_the_sharding_of_fsdp_keeps_its_meaning(text: str, values: dict[str, Any], empty_folder: Path) -> None:
    body = text if text.startswith("{") else f"{{{text}}}"
    head = "distributed_type: FSDP\nnum_machines: 2\nnum_processes: 4\n"
    Path("acc.yaml").write_text(f"{head}fsdp_config: {body}\n", encoding="utf-8")
    assert dltrain("config", "import", "acc.yaml", "-o", "job.yaml").code == 0
    parallel = resolved("job.yaml")["parallel"]
    assert parallel | values == parallel


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_every_key_of_zero_that_this_deepspeed_has_is_known() -> None:
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "runtime/zero/config.py").read_text(encoding="utf-8")
    model = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "DeepSpeedZeroConfig")
    names = set[str]()
    for node in model.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            aliases = [k.value for k in getattr(node.value, "keywords", ()) if k.arg == "alias"]
            names.add(ast.literal_eval(aliases[0]) if aliases else node.target.id)
    assert len(names) > 30
    assert names - set(ZERO_KEYS) == set()


def run_as_told(sandbox: Sandbox, done: Done | subprocess.CompletedProcess[str]) -> str:
    """What the command that an import prints writes to its standard output."""
    text = done.out if isinstance(done, Done) else done.stdout
    environ = sandbox.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["bash", "-ec", command_in(text)],
        cwd=sandbox.folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_an_accelerate_script_runs_as_the_import_says(sandbox: Sandbox) -> None:
    shutil.copy(PROGRAMS / "peer_script.py", sandbox.folder / "train.py")
    config = "distributed_type: MULTI_CPU\nmixed_precision: bf16\nnum_machines: 1\nnum_processes: 2\nuse_cpu: true\n"
    (sandbox.folder / "acc.yaml").write_text(config, encoding="utf-8")
    line = ("accelerate", "launch", "--config_file", "acc.yaml", "train.py", "--lr", "a b")
    out = run_as_told(sandbox, sandbox.run("config", "import", "--", *line))
    facts = json.loads(out.partition("FACTS ")[2].splitlines()[0])
    assert (facts["ranks"], facts["args"]) == (2, ["--lr", "a b"])
    assert facts["told"] == {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_a_deepspeed_script_and_a_job_of_its_json_both_run(sandbox: Sandbox) -> None:
    shutil.copy(PROGRAMS / "zero_script.py", sandbox.folder / "train.py")
    config = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "optimizer": {"type": "Adam", "params": {"lr": 0.05, "torch_adam": True}},
        "gradient_clipping": 1.0,
    }
    (sandbox.folder / "ds.json").write_text(json.dumps(config), encoding="utf-8")
    (sandbox.folder / "hosts").write_text("localhost slots=2\n", encoding="utf-8")
    line = ("deepspeed", "--hostfile", "hosts", "train.py", "--deepspeed", "--deepspeed_config", "ds.json")
    out = run_as_told(sandbox, sandbox.run("config", "import", "--", *line))
    assert "ZERO stage 2 world 2 batch 16 fell True" in out

    assert sandbox.run("config", "import", "hosts", "ds.json", "-o", "job.yaml").returncode == 0
    short = ("train.steps=2", "model.widths=[4]", "model.hidden=16", "tracking.wandb.mode=disabled")
    done = sandbox.run("launch", "job.yaml", *short)
    assert done.returncode == 0, done.stderr
    job = json.loads((sandbox.folder / "runs/digits/0001/run.json").read_text(encoding="utf-8"))["job"]
    assert job["parallel"]["strategy"] == "zero2"
    assert job["train"]["global_batch"] == 16
