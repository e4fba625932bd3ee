"""Jobs that ask for DeepSpeed: what of them, and of a native configuration, is refused before anything starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from dltrain.core.errors import JobError, Problem
from dltrain.core.job import Job
from dltrain.core.zero import settings
from jobfiles import load, problem, problems

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.usefixtures("empty_folder")

NATIVE = "parallel={strategy: zero2, deepspeed: ds.json}"
TWO_RANKS = ("resources.nodes=2", "resources.nproc_per_node=1")


def native(**keys: Any) -> None:
    Path("ds.json").write_text(json.dumps(keys), encoding="utf-8")


def test_deepspeed_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    found = problem("parallel:\n  strategy: zero3\n")
    assert found == Problem(
        "DeepSpeed is not installed", "dltrain.yaml:2: parallel.strategy", "pip install 'dltrain[deepspeed]'"
    )
    assert load(None, "parallel.strategy=ddp").job.parallel.zero_stage == 0


def test_another_version_of_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("elsewhere/deepspeed-0.18.4.dist-info")
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.4\n", encoding="utf-8")
    monkeypatch.syspath_prepend("elsewhere")
    assert problem(None, "parallel.strategy=zero1").what == "DeepSpeed 0.18.4 is installed, 0.19 is needed"


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_optimizers_of_whole_matrices_are_refused(name: str) -> None:
    found = problem("parallel: {strategy: zero1}\n", f"train.optimizer.name={name}")
    assert found.where.endswith("train.optimizer.name")
    assert found.what.startswith(f"'{name}' needs whole matrices")
    found = problem(None, "parallel.strategy=zero1", f"train.parts={{cnn: {{name: {name}}}}}")
    assert "train.parts" in found.where


def test_what_only_zero_does_is_refused_elsewhere() -> None:
    assert "'offload' is for the strategies fsdp, zero1" in problem(None, "parallel.offload=cpu").what
    assert "'deepspeed' is for the strategies zero1" in problem(None, "parallel.deepspeed=ds.json").what
    assert "'tensor' is for the strategies ddp and fsdp" in problem("parallel: {strategy: zero1, tensor: 2}").what
    assert problem(None, "parallel.strategy=zero3", "train.compile=true").where.endswith("train.compile")


@pytest.mark.parametrize(
    ("text", "what"), [("{", "'ds.json' is no JSON"), ("[1]", "'ds.json' holds no JSON object"), (None, "no such file")]
)
def test_a_file_that_cannot_be_read(text: str | None, what: str) -> None:
    if text is not None:
        Path("ds.json").write_text(text, encoding="utf-8")
    assert problem(None, NATIVE).what.startswith(what)


@pytest.mark.parametrize(
    ("keys", "job", "what"),
    [
        ({"train_batch_size": 32}, (), "train_batch_size is 32, the job's train.global_batch says 64"),
        (
            {"gradient_accumulation_steps": 4},
            (*TWO_RANKS, "train.microbatches=4"),
            "gradient_accumulation_steps is 4, the job's train.microbatches on 2 ranks says 2",
        ),
        (
            {"train_micro_batch_size_per_gpu": 64},
            TWO_RANKS,
            "train_micro_batch_size_per_gpu is 64, the job's train.global_batch / train.microbatches says 32",
        ),
        (
            {"gradient_clipping": 0.5},
            ("train.clip_norm=1.0",),
            "gradient_clipping is 0.5, the job's train.clip_norm says 1.0",
        ),
        ({"gradient_clipping": 0.5}, (), "gradient_clipping is 0.5, the job's train.clip_norm says 0.0"),
        (
            {"zero_optimization": {"stage": 3}},
            (),
            "zero_optimization.stage is 3, the job's parallel.strategy 'zero2' says 2",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            (),
            'zero_optimization.offload_optimizer.device is "cpu", the job\'s parallel.offload says "none"',
        ),
        ({"fp16": {"enabled": True}}, (), "fp16.enabled is true, the job's train.precision 'fp32' says false"),
        ({"bf16": {"enabled": True}}, (), "bf16.enabled is true, the job's train.precision 'fp32' says false"),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            (),
            'optimizer.type is "adam", the job\'s train.optimizer.name says "adamw"',
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
            (),
            "optimizer.params.lr is 0.1, the job's train.optimizer.lr says 0.001",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {}}},
            (),
            'scheduler.type is "WarmupLR", the job\'s train.schedule says "cosine"',
        ),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            (),
            "keeps weights where checkpoints do not find them",
        ),
        ({"sparse_gradients": True}, (), "sparse_gradients changes what is computed"),
        (
            {"zero_force_ds_cpu_optimizer": True},
            (),
            "zero_force_ds_cpu_optimizer is true, the job's train.optimizer says false",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, (), "tensor_parallel spreads the model"),
        ({"elasticity": {"enabled": True}}, (), "elasticity changes what is computed"),
        ({"wandb": {"enabled": True}}, (), "wandb is done by dltrain"),
    ],
)
def test_what_contradicts_the_job_is_refused_with_both_values(
    keys: dict[str, Any], job: tuple[str, ...], what: str
) -> None:
    native(**keys)
    found = problem(None, NATIVE, *job)
    assert what in found.what
    assert "parallel" in found.where
    with pytest.raises(JobError, match=r"ds\.json"):
        settings(load(None, *job).job.model_copy(update={"parallel": zero2()}), 2)


def zero2() -> Any:
    return Job.model_validate({"parallel": {"strategy": "zero2", "deepspeed": "ds.json"}}).parallel


def test_every_contradiction_is_told_at_once() -> None:
    native(train_batch_size=1, gradient_clipping=2, zero_optimization={"stage": 1})
    assert len(problems(None, NATIVE)) == 3


def test_what_agrees_or_is_auto_or_is_deepspeeds_own_passes() -> None:
    native(
        train_batch_size=64,
        gradient_accumulation_steps="auto",
        gradient_clipping=1,
        optimizer={"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": "auto"}},
        scheduler={},
        fp16={"enabled": False},
        zero_optimization={"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000, "zero_hpz_partition_size": 1},
        wall_clock_breakdown=True,
        wandb={"enabled": False},
        elasticity={"enabled": False},
    )
    job = load(None, NATIVE, *TWO_RANKS, "train.clip_norm=1.0", "train.microbatches=6").job
    found = settings(job, 2)
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000
    assert found["zero_optimization"]["allgather_bucket_size"] == 25 * 2**20 // 4
    assert found["zero_optimization"]["overlap_comm"] is False
    assert found["wall_clock_breakdown"] is True
    assert found["gradient_accumulation_steps"] == 3
    assert found["train_micro_batch_size_per_gpu"] == 11  # of 64 samples in 6 microbatches, the larger ones
    assert not {"optimizer", "scheduler", "train_batch_size"} & found.keys()


@pytest.mark.parametrize(("stage", "parameters"), [(1, None), (2, None), (3, "cpu")])
def test_the_job_says_what_is_offloaded(stage: int, parameters: str | None) -> None:
    job = Job.model_validate({"parallel": {"strategy": f"zero{stage}", "offload": "cpu"}})
    found = settings(job, 1)["zero_optimization"]
    assert found["stage"] == stage
    assert found["offload_optimizer"] == {"device": "cpu"}
    assert found.get("offload_param", {}).get("device") == parameters


def test_clipping_is_always_written_since_deepspeed_would_clip_at_1() -> None:
    assert settings(Job.model_validate({"parallel": {"strategy": "zero1"}}), 1)["gradient_clipping"] == 0.0
