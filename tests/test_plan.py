"""``dltrain plan``: which ways there are, what a step costs, what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import dltrain
from dltrain.core.config import load_job
from dltrain.core.errors import JobError
from dltrain.core.gpus import GPUS, find_gpu
from dltrain.core.job import Job
from dltrain.core.parallel import Parallel
from dltrain.launcher.candidates import candidates, with_values
from dltrain.launcher.dryruns import DryRuns
from dltrain.launcher.hardware import Machines
from dltrain.launcher.plan import make_plan
from dltrain.launcher.steptime import Sent, step_time

LM = ("recipe=transformer", "data.source=stdlib_text", "data.options.length=64", "train.global_batch=64")


def test_ways_that_arithmetic_refuses_have_a_reason() -> None:
    ways = candidates(Job.model_validate({"train": {"global_batch": 12}}), nodes=2, per_node=8)
    refused = {
        way.values.get("parallel.tensor", 1) * way.values.get("parallel.pipeline", 1): way.reason for way in ways
    }
    assert "cannot be cut into 16 microbatches" in refused[1]
    assert not any(way.reason for way in ways if way.values.get("parallel.tensor") == 2)


def test_ways_keep_what_the_job_says_beside_them() -> None:
    job = Job.model_validate({"parallel": {"strategy": "fsdp", "offload": "cpu", "tensor": 2}})
    kept = {way.job.parallel.strategy: way.job.parallel for way in candidates(job, nodes=1, per_node=4) if way.job}
    assert kept["zero3"].offload == "cpu"
    assert kept["zero3"].tensor == 1
    assert kept["ddp"].offload == "none"
    both = with_values(job, {"parallel.strategy": "ddp", "parallel.replicas": 2}, nodes=1, per_node=4)
    assert "replicas" in both.reason


def test_names_of_gpus() -> None:
    assert find_gpu("h100-80gb") is find_gpu("h100") is GPUS["H100-80GB"]
    assert (find_gpu("cpu-24GB").memory, find_gpu("cpu-24GB").is_cpu) == (24_000_000_000, True)
    for name, hint in (("H10-80GB", "did you mean H100-80GB?"), ("A100", "A100-80GB or A100-40GB?")):
        with pytest.raises(JobError) as error:
            find_gpu(name)
        assert hint in error.value.problems[0].hint


def test_what_a_step_waits_for() -> None:
    gpu = GPUS["H100-80GB"]
    gradients = Sent("reduce", 16, 2, 1e9, 1)
    hidden = step_time(1.0, [gradients], gpu, Parallel(), microbatches=1)
    assert hidden.total < 1.01, "gradients are sent while backward computes"
    assert step_time(1e-3, [gradients], gpu, Parallel(), microbatches=1).sending > 1e-3, "what it cannot hide shows"
    tensor = step_time(1.0, [Sent("reduce", 8, 1, 1e9, 1)], gpu, Parallel(tensor=8), microbatches=1)
    assert tensor.sending == pytest.approx(1e9 / (450e9 * 0.8) + 3 * 5e-6)
    near = step_time(0.0, [Sent("gather", 8, 1, 1e9, 1)], gpu, Parallel(), microbatches=1)
    far = step_time(0.0, [Sent("gather", 8, 8, 1e9, 1)], gpu, Parallel(), microbatches=1)
    assert far.sending > 5 * near.sending
    stages = Parallel(pipeline=4)
    assert step_time(1.0, [], gpu, stages, microbatches=6).waiting == pytest.approx(0.5)


def job_of(*overrides: str) -> Job:
    return load_job(None, (*LM, *overrides), {}, {}, recipes=["transformer"]).job


def ask(runs: DryRuns, job: Job, *, world: int, rank: int = 0) -> dict[str, Any]:
    """The footprint of a rank of a job with GPUs."""
    rates = dict.fromkeys(("half", "full", "memory", "launch"), 1.0)
    device = {"rates": rates, "gpu": True, "fused": ["half", "full"], "grouped": ["half"]}
    field = {"shape": [64], "dtype": "int64"}
    request = {"ask": "footprint", "job": job.model_dump(mode="json"), "world": world, "rank": rank, "per_node": 8}
    return runs.ask({**request, "samples": {"x": field, "y": field}, "evaluated": 8, "device": device}).result()


def test_few_blocks_and_few_ranks_tell_of_many() -> None:
    """12 blocks are followed as 4, 64 ranks as 16; 8 and 9 blocks, and 16 ranks, are followed as they are."""

    def peaks(runs: DryRuns, layers: int, strategy: str, world: int) -> dict[str, float]:
        # each rank has the same number of samples
        job = job_of(f"model.layers={layers}", f"parallel.strategy={strategy}", f"train.global_batch={2 * world}")
        return {phase: sum(kinds.values()) for phase, kinds in ask(runs, job, world=world)["peaks"].items()}

    with DryRuns(1) as runs:
        for strategy in ("ddp", "fsdp"):
            eight, nine, twelve = (peaks(runs, layers, strategy, 4) for layers in (8, 9, 12))
            assert twelve == pytest.approx({phase: nine[phase] + 3 * (nine[phase] - eight[phase]) for phase in nine})
        few, many = (peaks(runs, 8, "fsdp", world) for world in (16, 64))
        assert all(many[phase] <= few[phase] for phase in few)
        assert many["backward"] > few["backward"] / 2, "activations are the same"


def test_all_ranks_together_compute_the_same_and_share_what_they_hold() -> None:
    common = ("train.microbatches=8", "model.kv_heads=4")
    with DryRuns(1) as runs:
        one = ask(runs, job_of(*common), world=1)
        for spread, ranks in ((("parallel.tensor=2",), (0, 0)), (("parallel.pipeline=2",), (0, 1))):
            found = [ask(runs, job_of(*common, *spread), world=2, rank=rank) for rank in ranks]
            assert sum(each["flops"] for each in found) == pytest.approx(one["flops"], rel=0.01)
            held = sum(each["held"]["weights"] for each in found) / one["held"]["weights"]
            assert 1 <= held < 1.2, "norms are everybody's, and both ends of a pipeline hold a tied matrix"
            assert all(sum(each["peaks"]["evaluate"].values()) > 0 for each in found)


@pytest.mark.slow
def test_deepspeed_leaves_nothing_behind_in_what_follows_a_step() -> None:
    """It would put its own linear in the place of torch's."""
    sharded = job_of("parallel.strategy=fsdp", "train.recompute=true")
    with DryRuns(1) as runs:
        before = ask(runs, sharded, world=2)
        assert "problems" not in ask(runs, job_of("parallel.strategy=zero3"), world=2)
        assert ask(runs, sharded, world=2) == before


def test_the_table_and_its_first_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = dltrain("plan", *LM, "--nodes", "2", "--gpus-per-node", "1", "--gpu", "T4")
    assert done.code == 0, done.err
    assert max(map(len, done.out.split("\nnext:")[0].splitlines())) <= 100
    for text in ("2 × 1 T4-16GB", "the first: ", "mesh", "peak (", "FLOP use", "more involved ways", "the job: ddp"):
        assert text in done.out
    assert "dltrain launch recipe=transformer" in done.out.split("next:")[1]


def test_nothing_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    machine = ("--gpu", "T4", "--gpus-per-node", "1")
    done = dltrain("plan", *LM, *machine, "--memory", "100KiB")
    assert done.code == 1
    assert "nothing fits; what comes closest" in done.out
    (row,) = json.loads(dltrain("plan", *LM, *machine, "--memory", "1600MiB", "--json").out)["rows"]
    assert row["state"] == "too large"
    assert row["total_bytes"] == sum(row["bytes"].values())
    assert row["bytes"]["weights"] == 115_008 * 4


def test_wrong_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, says in (
        (("--gpu", "H1000"), "is no GPU of the table"),
        (("--gpu", "T4", "--nodes", "0"), "--nodes: 0 is not above 0"),
        (("--gpu", "T4", "--memory", "much"), "--memory: 'much' is no size"),
        (("--gpu", "T4", "data.source=nowhere.csv"), "nowhere.csv"),
    ):
        done = dltrain("plan", *LM, *words)
        assert done.code == 2
        assert says in done.err


def test_a_recipe_that_looks_at_values_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "looks.py").write_text(
        "import torch\n"
        "class Looks:\n"
        "    def parts(self): return {'it': torch.nn.Linear(64, 1)}\n"
        "    def layout(self, part):\n"
        "        from dltrain import Layout\n"
        "        return Layout()\n"
        "    def loss(self, part, parts, batch):\n"
        "        y = parts['it'](batch['x'].flatten(1))\n"
        "        return y[y > 0].mean()\n"
        "    def metrics(self, parts, batch): return {}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    job = load_job(None, ("recipe=looks:Looks",), {}, {}).job
    plan = make_plan(job, Machines(1, 1, GPUS["T4-16GB"], 10**10), said=lambda _: None)
    assert plan.best is None
    assert "cannot be followed without its values" in plan.rows[0].reason
