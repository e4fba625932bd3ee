"""Launches on an existing Ray cluster: placement, warm fork servers, tokens, and what they leave on it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from dltrain.core.processes import name_of
from dltrain.launcher.chaos.machines import Machine, machines, why_not
from launching import Sandbox, wait_for
from ray_clusters import RayCluster, ray_head, ray_on
from runs import RunFolder

pytestmark = pytest.mark.timeout(900)  # some take over a minute where the machine is busy

JOB = ("model.widths=[4]", "model.hidden=16", "train.steps=20", "tracking.wandb.mode=disabled")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with ray_head(tmp_path_factory.mktemp("ray"), "--num-cpus=4", RAY_AUTH_MODE="disabled") as head:
        yield head


def servers(box: Sandbox) -> set[int]:
    """Fork servers that the sandbox's launches started, on the cluster's node too: they carry the launch's mark.

    Their forks, ranks and these ranks' persisters, have names of their own, and may be about to end.
    """
    found = [pid for pid, line in box.processes().items() if "launcher.forkserver" in line]
    return {pid for pid in found if not name_of(pid).startswith("dltrain-")}


def test_a_second_launch_finds_the_fork_server_warm_and_computes_the_same(sandbox: Sandbox, head: RayCluster) -> None:
    command = ("launch", "--address", head.address, "--nproc-per-node", "2", *JOB)
    embedded = sandbox.run("launch", "--nproc-per-node", "2", *JOB)
    assert embedded.returncode == 0, embedded.stderr
    first = sandbox.run(*command, "--keep-warm", "10min", **head.environ)  # longer than the second may take
    assert first.returncode == 0, first.stderr
    warm = servers(sandbox)
    assert len(warm) == 1
    second = sandbox.run(*command, **head.environ)
    assert second.returncode == 0, second.stderr
    assert servers(sandbox) == warm
    runs = [RunFolder(sandbox.folder / f"runs/digits/000{n}") for n in (1, 2, 3)]
    assert len({run.weights() for run in runs}) == 1
    assert runs[0].numbers() == runs[1].numbers() == runs[2].numbers()
    wait_for(lambda: not head.agents(), what="the end of the agents")
    os.kill(warm.pop(), signal.SIGTERM)
    wait_for(lambda: not servers(sandbox), what="the end of the server, which nobody has a lease on")


def test_placement_says_what_does_not_fit_and_what_would(sandbox: Sandbox, head: RayCluster) -> None:
    on = ("launch", "--address", head.address, *JOB)
    for extra, says in (
        (("--nodes", "2"), "--placement pack lets logical nodes share a machine"),
        (("--nodes", "2", "--placement", "spread"), "--placement pack lets logical nodes share a machine"),
        (("--nodes", "2", "--nproc-per-node", "3", "--placement", "pack"), "room for 1 of 2 nodes of 3 CPU"),
        (("--nproc-per-node", "5"), "room for 0 of 1 nodes of 5 CPU"),
        (("resources.cpus_per_rank=5",), "room for 0 of 1 nodes of 5 CPU"),
        (("--network-interface", "eth99"), "no network interface 'eth99'"),
        (("recipe=nowhere:Net",), "no module named 'nowhere'"),
        (("model.width=[4]",), "did you mean 'widths'?"),
    ):
        refused = sandbox.run(*on, *extra, **head.environ)
        assert refused.returncode == 2, refused.stdout
        assert says in refused.stderr
        assert not (sandbox.folder / "runs").exists()
    done = sandbox.run(*on, "--nodes", "4", "--placement", "pack", **head.environ)  # all of it: nothing is still held
    assert done.returncode == 0, done.stderr
    wait_for(lambda: not head.agents(), what="the end of the agents")


def test_a_busy_cluster_is_waited_for_and_then_named(sandbox: Sandbox, head: RayCluster) -> None:
    gate = sandbox.folder / "hold.py"
    gate.write_text("import pathlib, signal\npathlib.Path('holding').touch()\nsignal.pause()\n", encoding="utf-8")
    with sandbox.start("launch", "--address", head.address, "--nproc-per-node", "4", "hold.py", **head.environ):
        wait_for((sandbox.folder / "holding").exists, what="the cluster to be busy")
        late = sandbox.run("launch", "--address", head.address, *JOB, "recovery.start_timeout=2s", **head.environ)
    assert late.returncode == 1
    assert "the cluster did not free 1 × 1 CPU within 2 s; free now: nothing" in late.stderr
    assert not (sandbox.folder / "runs/digits").exists()
    wait_for(lambda: not head.agents(), what="the end of the killed launch's agent")


@pytest.mark.slow
def test_a_cluster_with_a_token_is_joined_with_it_and_not_without(
    sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    with ray_head(tmp_path_factory.mktemp("ray"), "--num-cpus=4", **token) as head:
        command = ("launch", "--address", head.address, *JOB)
        assert sandbox.run(*command, **token).returncode == 0
        kept = sandbox.folder / ".ray/auth_token"  # where `ray start` leaves the one that it makes
        kept.parent.mkdir()
        kept.write_text(token["RAY_AUTH_TOKEN"], encoding="utf-8")
        assert sandbox.run(*command).returncode == 0
        for wrong in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}):
            refused = sandbox.run(*command, **wrong)
            assert refused.returncode == 2, refused.stdout
            assert f"no Ray cluster answers at {head.address}" in refused.stderr
        printed = "".join(path.read_text(errors="replace") for path in sandbox.folder.rglob("*.*") if path.is_file())
        assert token["RAY_AUTH_TOKEN"] not in printed


def test_ranks_are_counted_by_the_clusters_gpus(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = sandbox.folder / "gpus.py"
    script.write_text("import os; print(os.environ['RANK'], os.environ['CUDA_VISIBLE_DEVICES'])\n", encoding="utf-8")
    with ray_head(tmp_path_factory.mktemp("ray"), "--num-cpus=3", "--num-gpus=3", RAY_AUTH_MODE="disabled") as head:
        done = sandbox.run("launch", "--address", head.address, "--nproc-per-node", "gpu", "gpus.py", **head.environ)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 0,1,2", "1 0,1,2", "2 0,1,2"]


class Lan(NamedTuple):
    machines: list[Machine]
    ray: RayCluster
    hidden: Path


@pytest.fixture
def lan(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    """Three machines with a CPU each; commands run on the first, and the last does not see the folder ``hidden``."""
    if reason := why_not():
        pytest.skip(reason)
    hidden = sandbox.folder / "hidden"
    hidden.mkdir()
    with machines(3) as three:
        three[2].run("mount", "-t", "tmpfs", "tmpfs", str(hidden))
        with ray_on(three, tmp_path_factory.mktemp("ray"), "--num-cpus=1") as ray:
            sandbox.prefix = three[0].prefix
            yield Lan(three, ray, hidden)


@pytest.mark.slow
def test_nodes_on_several_machines(sandbox: Sandbox, lan: Lan) -> None:
    on = ("launch", "--address", lan.ray.address, "--nodes", "3")
    job = (*JOB, "train.global_batch=48", "resources.cpus_per_rank=1")  # threads share out sums: they change bits
    done = sandbox.run(*on, *job, **lan.ray.environ)
    assert done.returncode == 0, done.stderr
    run = RunFolder(sandbox.folder / "runs/digits/0001")
    hosts = json.loads((run.path / "environment.json").read_text())["hosts"]
    assert [host["hostname"] for host in hosts] == ["m0", "m1", "m2"]
    assert [host["address"] for host in hosts] == [machine.address for machine in lan.machines]
    embedded = sandbox.run("launch", "--nodes", "3", "--resume", "never", *job)
    assert embedded.returncode == 0, embedded.stderr
    assert RunFolder(sandbox.folder / "runs/digits/0002").weights() == run.weights()

    refused = sandbox.run(*on, "--run-dir", str(lan.hidden), *job, **lan.ray.environ)
    assert refused.returncode == 2, refused.stdout
    assert "node 2 (m2) does not see" in refused.stderr
    assert "s3://" in refused.stderr
    assert not [path for path in lan.hidden.rglob("*") if path.is_file()]
    shared = sandbox.folder / "shared"
    apart = sandbox.run(*on, "--run-dir", str(lan.hidden), f"checkpoint.to={shared}", *job, **lan.ray.environ)
    assert apart.returncode == 0, apart.stderr
    far = RunFolder(lan.hidden / "digits/0001")
    assert far.weights() == run.weights()

    script = sandbox.folder / "where.py"
    script.write_text("import os, socket; print(os.environ['GROUP_RANK'], socket.gethostname())\n", encoding="utf-8")
    said = sandbox.run(*on, "--run-dir", str(lan.hidden), "where.py", **lan.ray.environ)
    assert sorted(said.stdout.splitlines()) == ["0 m0", "1 m1", "2 m2"]
    logs = {path.parent.name: path.read_text() for path in lan.hidden.glob("where/0001/logs/*/*/stdout.log")}
    assert logs == {f"rank-{rank}": f"{rank} m{rank}\n" for rank in range(3)}  # copied over from where it is hidden


@pytest.mark.slow
def test_a_machine_that_vanishes_ends_the_run_by_name(sandbox: Sandbox, lan: Lan) -> None:
    command = ("launch", "--address", lan.ray.address, "--nodes", "3", *JOB, "train.steps=1000000")
    with sandbox.start(*command, "--max-restarts", "0", "train.global_batch=48", **lan.ray.environ) as process:
        metrics = sandbox.folder / "runs/digits/0001/metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 1000, what="training to begin")
        lan.machines[2].pull_the_cable()
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "node 2" in said
    report = (sandbox.folder / "runs/digits/0001/failures/0000.txt").read_text()
    assert "m2" in report
    wait_for(lambda: not lan.ray.agents(), what="the end of the agents")
