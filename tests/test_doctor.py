"""``dltrain doctor`` and ``launch --preflight`` against real clusters."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dltrain.core.errors import Interrupted
from dltrain.core.job import CheckpointSpec, TrackingSpec
from dltrain.launcher.chaos.machines import Machine, machines, why_not
from dltrain.launcher.doctor import look
from dltrain.launcher.messages import NodeInfo
from launching import Sandbox
from ray_clusters import RayCluster, ray_on
from wandb_server import Fault, StandIn


def test_this_machine_is_looked_at_and_its_storage_tried(sandbox: Sandbox) -> None:
    done = sandbox.run("doctor", "--nodes", "2", "checkpoint.to=there", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["healthy"]
    assert [node["node"] for node in found["nodes"]] == [0, 1]
    assert all(node["flops"] > 0 and node["vitals"]["storage"] > 0 for node in found["nodes"])
    assert [(link["one"], link["other"]) for link in found["links"]] == [(0, 1)]
    assert found["links"][0]["bandwidth"] > 0
    assert not list((sandbox.folder / "there").iterdir())  # what was written to try it is gone

    (sandbox.folder / "file").write_text("", encoding="utf-8")
    refused = sandbox.run("launch", "--preflight", "checkpoint.to=file/below", "train.steps=2")
    assert refused.returncode == 2, refused.stdout
    assert "cannot write to" in refused.stderr
    assert not (sandbox.folder / "runs").exists()


def test_wrong_requests(sandbox: Sandbox) -> None:
    for arguments, says in (
        (("--address", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
        (("--address", "auto", "train.epoch=3"), "did you mean 'epochs'?"),
        (("nowhere.yaml",), "nowhere.yaml"),
    ):
        refused = sandbox.run("doctor", *arguments)
        assert refused.returncode == 2, refused.stdout
        assert says in refused.stderr


def test_the_tracker_is_asked_with_the_key_which_is_never_shown() -> None:
    from dltrain.tracking.wandb_reach import why_unreached

    key = "0123456789" * 4
    with StandIn() as server:
        environ = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": key, "HOME": "/nowhere"}
        assert why_unreached(environ) == ""
        for fault, says in ((401, "refuses this API key"), (500, "answers with HTTP Error 500"), ("drop", "does not")):
            server.fault = Fault(fault)
            said = why_unreached(environ)
            assert says in said
            assert key not in said
    assert "does not answer" in why_unreached(environ, timeout=1.0)
    assert why_unreached({"WANDB_BASE_URL": "lab:1", "HOME": "/nowhere"}).startswith("lab:1 does not answer")
    assert why_unreached({"WANDB_BASE_URL": "lab", "HOME": "/nowhere"}) == "'lab' is no URL"
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=greet, args=(other,), daemon=True).start()
        environ = {"WANDB_BASE_URL": f"http://127.0.0.1:{other.getsockname()[1]}", "HOME": "/nowhere"}
        assert "does not answer as a W&B server does" in why_unreached(environ)


def greet(listener: socket.socket) -> None:
    """Answer as a server of another protocol."""
    with listener.accept()[0] as near:
        near.sendall(b"SSH-2.0-OpenSSH\r\n")
        near.shutdown(socket.SHUT_WR)
        while near.recv(65536):  # closed with any of the request unread, it would be reset, and the answer lost
            pass


class StoppedCluster:
    """A node that is asked to stop while it measures. A request to its agent is known by its name."""

    def __init__(self) -> None:
        self.nodes = [NodeInfo(0, "m0", "127.0.0.1", "r0", 1, None, (0,), 1, ((0,),), (), {})]
        self.agents = [self]
        self.measured = 0

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *_args, **_more: name)

    def gather(self, refs: Sequence[str], *, waiting_for: str, timeout: float | None = None) -> list[Any]:
        if refs == ["errand"]:
            self.measured += 1
            raise Interrupted("stopped", signum=2)
        answers = {"examine": SimpleNamespace(at=time.time()), "open_store": 29500, "close_stores": None}
        return [answers[ref] for ref in refs]


def test_a_stop_ends_the_measuring_and_is_no_finding(tmp_path: Path) -> None:
    cluster: Any = StoppedCluster()
    with pytest.raises(Interrupted) as stop:  # exit code 130
        look(
            cluster,
            checkpoint=CheckpointSpec(),
            tracking=TrackingSpec(),
            runs=tmp_path,
            phase=lambda _: None,
            pairings=None,
        )
    assert (stop.value.signum, cluster.measured) == (2, 1)


@pytest.fixture
def lan(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Machine], RayCluster]]:
    """Four machines with a CPU each; commands run on the first."""
    if reason := why_not():
        pytest.skip(reason)
    with machines(4) as four, ray_on(four, tmp_path_factory.mktemp("ray"), "--num-cpus=1") as ray:
        sandbox.prefix = four[0].prefix
        yield four, ray


def slow_down(machine: Machine) -> None:
    """Give its link 100 Mbit/s."""
    shape = ("tbf", "rate", "100mbit", "burst", "64kb", "latency", "50ms")
    machine.run("tc", "qdisc", "add", "dev", "eth0", "root", *shape)


@pytest.mark.campaign
def test_the_machine_with_a_slow_link_is_named_and_a_healthy_cluster_accused_of_nothing(
    sandbox: Sandbox, lan: tuple[list[Machine], RayCluster]
) -> None:
    four, ray = lan
    doctor = ("doctor", "--address", ray.address)
    healthy = sandbox.run(*doctor, **ray.environ)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert "4 nodes: healthy" in healthy.stdout
    slow_down(four[2])
    slow = sandbox.run(*doctor, "--json", **ray.environ)
    assert slow.returncode == 1, slow.stdout + slow.stderr
    assert [finding["nodes"] for finding in json.loads(slow.stdout)["findings"] if finding["sick"]] == [[2]]
    on = ("launch", "--address", ray.address, "--nodes", "4", "train.steps=2", "train.global_batch=64")
    refused = sandbox.run(*on, "--preflight", **ray.environ)
    assert refused.returncode == 2, refused.stdout
    assert "node 2 (m2): its network link has " in refused.stderr
    assert not (sandbox.folder / "runs").exists()


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_of_ten_tries_each_nobody_healthy_is_accused_and_the_slow_link_is_named_nine_times(
    sandbox: Sandbox, lan: tuple[list[Machine], RayCluster]
) -> None:
    four, ray = lan

    def sick() -> list[list[int]]:
        done = sandbox.run("doctor", "--address", ray.address, "--json", **ray.environ)
        assert done.returncode in (0, 1), done.stderr
        findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
        return [finding["nodes"] for finding in findings if finding["sick"]]

    healthy = [sick() for _ in range(10)]
    slow_down(four[2])
    slow = [sick() for _ in range(10)]
    counts = f"healthy: {healthy}; node 2 slow: {slow}"
    print(counts)  # shown by pytest -s, and where it fails
    assert healthy == [[]] * 10, counts
    assert slow.count([[2]]) >= 9, counts
    assert all(found in ([[2]], []) for found in slow), counts  # nobody else
