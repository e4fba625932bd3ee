"""``parallel.strategy: auto``: what is chosen, for which machines, and that runs keep it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command import dltrain
from dltrain.core.config import load_job
from dltrain.core.errors import JobError
from dltrain.core.gpus import GPUS, cpu, recognise
from dltrain.core.job import Job
from dltrain.launcher.auto import Choice, choose
from dltrain.launcher.candidates import applied, candidates
from dltrain.launcher.demand import Demand
from dltrain.launcher.hardware import Machines, machines_of
from dltrain.launcher.messages import NodeInfo
from dltrain.launcher.plan import make_plan
from dltrain.launcher.resume import decide_start
from dltrain.launcher.vitals import Gpu, Vitals
from launching import Sandbox
from stage import JOB, LAUNCH, WAIT_AT, put_recipe, run_of, stop_at

GIB = 2**30
AUTO = {"parallel": {"strategy": "auto"}}
WORDS = ("--strategy", "auto")
#: Half a gigabyte with the optimizer's state, and few activations; nothing that ZeRO takes, which is slow to import.
WIDE = {
    "recipe": "mlp",
    "model": {"hidden": [2048, 2048, 2048, 2048]},
    "data": {"source": "iris"},
    "train": {"compile": True, "global_batch": 16},
}


def job_of(*parts: Mapping[str, Any]) -> Job:
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = {**whole[key], **value} if isinstance(value, dict) and key in whole else value
    return Job.model_validate(whole)


def two_ranks(memory: int) -> Machines:
    return Machines(1, 2, cpu(memory, 1), memory)


def chosen(job: Job, machines: Machines, before: Mapping[str, Any] | None = None) -> Choice:
    return choose(
        job,
        demand=Demand(machines.nodes, machines.per_node, machines.per_node, 0, spread=False),
        before=before or {},
        machines=lambda: machines,
        target=WORDS,
        meanwhile=lambda: None,
    )


def test_a_small_job_takes_the_simplest() -> None:
    choice = chosen(job_of(AUTO), two_ranks(2 * GIB))
    assert choice.values == {"parallel.strategy": "ddp"}
    assert choice.job == Job()
    assert "\n" not in choice.why
    assert choice.why.startswith("strategy: ddp, ")
    assert "no other would be notably faster" in choice.why
    assert "dltrain plan --strategy auto --nodes 1 --gpus-per-node 2 --memory 2048MiB" in choice.why


def test_what_does_not_fit_whole_is_sharded() -> None:
    job = job_of(WIDE, AUTO)
    plan = make_plan(job, two_ranks(4 * GIB), said=lambda _: None)
    takes = {row.values["parallel.strategy"]: row.total for row in plan.rows if row.state == "fits"}
    between = int(takes["fsdp"] + takes["ddp"]) // 2
    choice = chosen(job, two_ranks(between))
    assert choice.values == {"parallel.strategy": "fsdp"}
    assert "(ddp would take " in choice.why
    with pytest.raises(JobError) as refused:
        chosen(job, Machines(1, 1, cpu(between, 1), between))
    first, second = refused.value.problems
    assert first.what.startswith("no strategy fits within the ")
    assert "what comes closest: ddp" in first.hint
    assert "dltrain plan --strategy auto" in first.hint
    assert (second.where, " of " in second.what) == ("ddp", True)


def test_the_first_of_the_table_is_taken_though_fewer_ways_are_looked_at() -> None:
    job = job_of(AUTO, {"train": {"compile": True}})
    machines = Machines(2, 1, GPUS["T4-16GB"], GPUS["T4-16GB"].memory)
    plan = make_plan(job, machines, said=lambda _: None)
    assert plan.best is not None
    assert plan.best.values == chosen(job, machines).values


def ways(job: Job, *, nodes: int = 1, per_node: int = 8) -> dict[str, str]:
    """Reasons by what the ways say, without ``parallel.``."""
    found = candidates(job, nodes=nodes, per_node=per_node)
    return {" ".join(f"{k.partition('.')[2]}={v}" for k, v in way.values.items()): way.reason for way in found}


def test_what_the_job_says_beside_it_holds() -> None:
    cut = ways(job_of({"parallel": {"strategy": "auto", "tensor": 4}}))
    assert not cut["strategy=ddp"]
    assert "'tensor' is for" in cut["strategy=zero1"]
    assert not any("tensor" in way for way in cut)
    assert len(cut) == len(set(cut))
    kept = ways(job_of({"parallel": {"strategy": "auto", "offload": "cpu"}}))
    assert "'offload' is for" in kept["strategy=ddp"]
    assert not kept["strategy=fsdp"]
    exact = ways(job_of({"parallel": {"strategy": "auto"}, "numerics": "reproducible", "train": {"microbatches": 8}}))
    assert [way for way, reason in exact.items() if not reason] == ["strategy=ddp"]


def test_a_run_with_a_changing_number_of_nodes_is_given_what_goes_with_all() -> None:
    changing = {"resources": {"nodes": 8}, "recovery": {"nodes": "4:8"}}
    found = candidates(job_of(AUTO, changing), nodes=4, per_node=2)
    assert {way.sizes for way in found if not way.reason} == {(4, 8)}
    fixed = job_of(AUTO, changing, {"train": {"microbatches": 48}})
    refused = {way.values["parallel.strategy"]: way for way in candidates(fixed, nodes=4, per_node=2) if way.reason}
    assert candidates(fixed, nodes=4, per_node=2)[0].sizes == (4, 6, 8)
    assert "pipeline" not in refused
    there = Machines(8, 2, cpu(2 * GIB, 1), 2 * GIB)
    choice = chosen(job_of(AUTO, changing), there)
    assert "chosen for 4 nodes, and possible with 4 or 8" in choice.why
    assert "recovery.nodes=4:8 resources.nodes=4 --nodes 4" in choice.why


def test_a_run_keeps_what_it_has_chosen(tmp_path: Path) -> None:
    job, before = job_of(AUTO), {"parallel.strategy": "fsdp", "train.microbatches": 64}
    start = decide_start(job, runs=tmp_path, resume="auto", on_message=print)
    start.open(applied(job, before), tmp_path, "", before)
    start.close()
    again = decide_start(job, runs=tmp_path, resume="auto", on_message=print)
    assert again.run is not None
    again.close()
    choice = chosen(job, two_ranks(2 * GIB), again.chosen)
    assert choice.values == before
    assert choice.job.parallel.strategy == "fsdp"
    assert choice.why == "strategy: fsdp, microbatches 64, which the run has chosen before"
    anew = chosen(job, Machines(1, 3, cpu(2 * GIB, 1), 2 * GIB), again.chosen)  # 3 ranks cannot be dealt 64
    assert anew.values == {"parallel.strategy": "ddp"}


def node(number: int, machine: str) -> NodeInfo:
    return NodeInfo(
        node=number,
        hostname=f"host-{machine}",
        address="10.0.0.1",
        ray_node=machine,
        pid=1,
        interface=None,
        cores=tuple(range(8)),
        cpus=8,
        numa=(),
        gpus=(),
        versions={},
    )


def vitals(memory: int, *gpus: Gpu, trouble: tuple[str, ...] = ()) -> Vitals:
    return Vitals(at=0.0, memory=memory, disks={}, shm=0, files=0, gpus=gpus, trouble=trouble)


def test_nodes_of_one_machine_share_its_memory() -> None:
    nodes = [node(0, "a"), node(1, "a"), node(2, "b")]
    found = machines_of(Demand(3, 2, 2, 0, spread=False), nodes, [vitals(8 * GIB), vitals(8 * GIB), vitals(5 * GIB)])
    assert (found.nodes, found.per_node, found.memory) == (3, 2, 2 * GIB)


def test_the_smallest_gpu_counts_and_what_others_take_of_it() -> None:
    def gpu(name: str, mib: float | None, used: float = 0.0) -> Gpu:
        return Gpu(0, name, mib, used, None, None)

    demand = Demand(2, 1, 1, 1, spread=True)
    nodes = [node(0, "a"), node(1, "b")]
    large, small = gpu("NVIDIA H100 80GB HBM3", 81559), gpu("NVIDIA A100-SXM4-40GB", 40960)
    found = machines_of(demand, nodes, [vitals(1, large), vitals(1, small)])
    assert (found.gpu.name, found.memory) == ("A100-40GB", GPUS["A100-40GB"].memory)
    taken = machines_of(demand, nodes, [vitals(1, large), vitals(1, gpu(large.name, 81559, 61559))])
    assert (taken.gpu.name, taken.memory) == ("H100-80GB", 20000 * 2**20)
    with pytest.raises(JobError, match=r"node 1 \(host-b\) are is not known: nvidia-smi hangs.*name a strategy"):
        machines_of(demand, nodes, [vitals(1, large), vitals(1, trouble=("nvidia-smi hangs",))])


@pytest.mark.parametrize(
    ("name", "gib", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "H100-80GB"),
        ("NVIDIA H100 PCIe", 79.6, "H100-PCIe-80GB"),
        ("NVIDIA A100-PCIE-40GB", 40, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100-80GB"),
        ("Tesla V100-SXM2-16GB", 16, "V100-16GB"),
        ("NVIDIA GeForce RTX 4090", 24, "RTX-4090-24GB"),
        ("NVIDIA L40S", 45, "L40S-48GB"),
        ("NVIDIA RTX 5000", 32, "V100-32GB"),  # not in the table
    ],
)
def test_gpus_are_known_by_what_drivers_call_them(name: str, gib: float, known: str) -> None:
    assert recognise(name, int(gib * GIB)).name == known


def test_scripts_and_wrong_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    done = dltrain("launch", "--strategy", "auto", "train.py")
    assert (done.code, done.out) == (2, "")
    assert "--strategy: does nothing for a script, only in a job" in done.err
    assert "nothing is planned of it" in done.err
    done = dltrain("launch", "--strategy", "aut")
    assert done.code == 2
    assert "did you mean 'auto'?" in done.err
    with pytest.raises(JobError, match="given twice"):
        load_job(None, ["parallel.strategy=ddp"], {"parallel.strategy": "auto"})


@pytest.mark.slow
def test_a_launch_chooses_says_so_and_goes_on_with_it(sandbox: Sandbox) -> None:
    put_recipe(sandbox)
    command = (*LAUNCH, "--strategy", "auto", *JOB)
    out, _ = stop_at(sandbox, WAIT_AT, *command)
    (line,) = [line for line in out.splitlines() if line.startswith("strategy: ")]
    run = run_of(sandbox)
    record = run.record()
    assert record["chosen"] == {"parallel.strategy": "ddp"}
    assert record["job"]["parallel"]["strategy"] == "ddp"
    assert "strategy: ddp\n" in (run.path / "job.yaml").read_text()
    shown = sandbox.run(*shlex.split(line.partition("the whole table: dltrain ")[2]))
    assert shown.returncode == 0, shown.stderr
    assert "the first: ddp" in shown.stdout
    done = sandbox.run(*command)
    assert done.returncode == 0, done.stderr
    assert "strategy: ddp, which the run has chosen before" in done.stdout
    assert run_of(sandbox).path == run.path


@pytest.mark.slow
def test_a_launch_that_nothing_fits_says_why(sandbox: Sandbox) -> None:
    few = ("recipe=mlp", "data.source=iris", "train.global_batch=1")
    done = sandbox.run("launch", "--nproc-per-node", "2", "--strategy", "auto", *few)
    assert done.returncode == 2
    assert "no strategy fits" in done.stderr
    assert "cannot be cut into 2 microbatches" in done.stderr
    assert "has no rules for tensor parallelism" in done.stderr
    assert not (sandbox.folder / "runs").exists()
