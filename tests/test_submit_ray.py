"""Jobs submitted to a real Ray cluster's Jobs API: code comes along; followed and stopped; a token."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command import dltrain
from dltrain.core.errors import RunFailed
from dltrain.launcher.submit.handle import Handle
from dltrain.launcher.submit.handles import write_handle
from dltrain.launcher.submit.jobs import output_of
from launching import BIN, Sandbox, wait_for
from ray_clusters import free_ports, ray_head
from runs import RunFolder

RAY = """\
#!{python}
# stands for Ray's cluster launcher: its machines are up, and its tunnel leads to the dashboard of a cluster here
import socket, sys, threading
open("ray.calls", "a").write(" ".join(sys.argv[1:]) + "\\n")

def pump(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)

if sys.argv[1] == "dashboard":
    server = socket.create_server(("127.0.0.1", int(sys.argv[3])))
    while True:
        near = server.accept()[0]
        far = socket.create_connection(("127.0.0.1", {port}))
        for pair in ((near, far), (far, near)):
            threading.Thread(target=pump, args=pair, daemon=True).start()
"""
MACHINES = """\
cluster_name: test
max_workers: 1
provider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2]}
"""
SCRIPT = """\
import os, pathlib, dltrain, helper
print("rank", os.environ["RANK"], helper.WORD, "dltrain from", dltrain.__file__)
print("sent:", sorted(path.name for path in pathlib.Path().rglob("*.*")), os.environ["MODE"])
"""


@pytest.mark.campaign
@pytest.mark.skipif(importlib.util.find_spec("aiohttp_cors") is None, reason="needs ray[default], for the dashboard")
def test_jobs_of_the_jobs_api_bring_their_code_and_are_followed_and_stopped(
    sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    (port,) = free_ports(1)
    files = {
        "train.py": SCRIPT,
        "helper.py": "WORD = 'helped'\n",
        ".gitignore": "*.big\n",
        "data.big": "0" * 1000,
        "cluster.yaml": f"kind: ray\naddress: http://127.0.0.1:{port}\nenvironment: [MODE]\n",
    }
    for name, text in files.items():
        (sandbox.folder / name).write_text(text, encoding="utf-8")
    options = ("--num-cpus=2", "--include-dashboard=true", f"--dashboard-port={port}")
    path = f"{BIN}:{sandbox.environ['PATH']}"
    with ray_head(tmp_path_factory.mktemp("ray"), *options, PATH=path, **token) as head:
        submit = ("submit", "--cluster", "cluster")
        done = sandbox.run(*submit, "--nproc-per-node=2", "-f", "train.py", **token, MODE="fast")
        assert done.returncode == 0, done.stdout + done.stderr
        for rank in range(2):
            assert f"rank {rank} helped dltrain from" in done.stdout
        assert "py_modules_files" in done.stdout
        assert "sent: ['.gitignore', 'cluster.yaml', 'helper.py', 'train.py'] fast" in done.stdout
        refused = sandbox.run(*submit, "train.py", MODE="", **(token | {"RAY_AUTH_TOKEN": "f" * 64}))
        assert refused.returncode == 1, refused.stdout
        assert "does not answer" in refused.stderr

        job = ("model.widths=[4]", "model.hidden=16", "train.steps=1000000", "tracking.wandb.mode=disabled")
        begun = sandbox.run(*submit, *job, MODE="", **token)
        assert begun.returncode == 0, begun.stderr

        def steps() -> int:
            status = sandbox.run("status", "--json", **token)
            return json.loads(status.stdout).get("step", 0)

        wait_for(lambda: steps() > 0, what="training", timeout=120)
        stopped = sandbox.run("stop", **token)
        assert stopped.returncode == 0, stopped.stderr
        assert "/ray-dltrain-" in stopped.stdout
        assert RunFolder(sandbox.folder / "runs/digits/0001").checkpoints()
        assert RunFolder(sandbox.folder / "runs/digits/0001").record()["state"] == "stopped"
        wait_for(lambda: not head.agents(), what="the end of the agents")

        ray = sandbox.folder / "bin/ray"
        ray.parent.mkdir()
        ray.write_text(RAY.format(python=sys.executable, port=port), encoding="utf-8")
        ray.chmod(0o755)
        (sandbox.folder / "own.yaml").write_text(MACHINES, encoding="utf-8")
        environ = token | {"MODE": "", "PATH": f"{ray.parent}:{sandbox.environ['PATH']}", "DLTRAIN_SEED": "3"}
        (sandbox.folder / "train.py").write_text("import os; print('seed', os.environ['DLTRAIN_SEED'])\n")
        done = sandbox.run("submit", "--cluster", "own", "-f", "train.py", **environ)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "seed 3" in done.stdout
        assert "finished (SUCCEEDED, exit code 0)" in done.stdout
        calls = (sandbox.folder / "ray.calls").read_text(encoding="utf-8").splitlines()
        assert calls[0] == f"up --yes {sandbox.folder}/own.yaml"
    written = "".join(p.read_text(errors="replace") for p in Path(sandbox.folder).rglob("*.*") if p.is_file())
    assert token["RAY_AUTH_TOKEN"] not in written


class Dashboard(BaseHTTPRequestHandler):
    """A head that was started again: it knows no job."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))  # closed unread, it would reset the connection
        known = self.path == "/api/version"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(b'{"version": "4", "ray_version": "2.60.0"}' if known else b"Job 7 does not exist")

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # said by Ray
def test_a_job_that_the_cluster_has_forgotten_is_said_to_be(empty_folder: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        handle = Handle("ray", "7", "digits", {"address": address})
        write_handle(empty_folder / "runs", handle)
        asked = dltrain("status")
        assert (asked.code, "unknown (the cluster does not know it)" in asked.out) == (1, True), asked.err
        for follow in (False, True):
            with pytest.raises(RunFailed, match=f"the Ray cluster at {address} does not answer for 7: .*404"):
                list(output_of(handle, follow=follow))
        server.shutdown()


TUNNEL = """\
#!/bin/sh
# stands for Ray's cluster launcher, whose tunnel is an ssh that it starts
{python} -m http.server --bind 127.0.0.1 "$3" &
wait
"""


def test_nothing_of_a_tunnel_stays(sandbox: Sandbox) -> None:
    ray = sandbox.folder / "bin/ray"
    ray.parent.mkdir()
    ray.write_text(TUNNEL.format(python=sys.executable), encoding="utf-8")
    ray.chmod(0o755)
    write_handle(sandbox.folder / "runs", Handle("vms", "7", "digits", {"file": str(sandbox.folder / "own.yaml")}))
    asked = sandbox.run("status", PATH=f"{ray.parent}:/usr/bin:/bin")
    assert (asked.returncode, "unknown (the Ray cluster at" in asked.stdout) == (1, True), asked.stderr
    wait_for(lambda: not sandbox.processes(), what="the end of the tunnel, which was killed")
    missing = sandbox.run("status", PATH="/usr/bin:/bin")
    assert (missing.returncode, "there is no 'ray' on the path" in missing.stdout) == (1, True), missing.stderr


WAITING = """\
import os, pathlib, time
print("rank", os.environ["RANK"], "waits")
pathlib.Path("waiting").touch()
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("aiohttp_cors") is None, reason="needs ray[default], for the dashboard")
def test_a_job_is_listed_followed_and_stopped_by_the_address_where_nothing_of_it_lies(
    sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (port,) = free_ports(1)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (sandbox.folder / "train.py").write_text(WAITING, encoding="utf-8")
    (sandbox.folder / "c.yaml").write_text(f"kind: ray\naddress: http://127.0.0.1:{port}\n", encoding="utf-8")
    options = ("--num-cpus=2", "--include-dashboard=true", f"--dashboard-port={port}")
    with ray_head(tmp_path_factory.mktemp("ray"), *options, PATH=f"{BIN}:{sandbox.environ['PATH']}") as head:

        def there(*command: str, code: int = 0) -> str:
            done = sandbox.run(*command, f"--address=http://127.0.0.1:{port}", f"--run-dir={elsewhere}")
            assert done.returncode == code, done.stdout + done.stderr
            return done.stdout

        assert "knows no job of dltrain" in there("runs")
        done = sandbox.run("submit", "--cluster", "c", "--run-dir", "runs", "train.py")
        assert done.returncode == 0, done.stderr
        name = done.stdout.partition("submitted ")[2].split()[0]
        number = name.partition("/ray-")[2]
        run = sandbox.folder / "runs/train/0001"

        wait_for(lambda: "rank 0 waits" in there("logs", number), what="the rank", timeout=120)
        (job,) = json.loads(there("runs", "--json"))
        assert (job["name"], job["state"], job["job"]) == ("train/0001", "running", f"ray-{number}")
        for word in (name, number, "train"):
            status = json.loads(there("status", "--json", word))
            assert (status["run"], status["job"]["id"], status["state"]) == (str(run), number, "running")
        with sandbox.start("logs", "-f", name, f"--address=http://127.0.0.1:{port}") as following:
            assert f"{name}: stopped" in there("stop", "train")
            out, err = following.communicate(timeout=120)
        assert following.returncode == 0, err
        assert "rank 0 waits" in out
        assert "stopped" in there("status", code=3)
        assert not list(elsewhere.iterdir())
        wait_for(lambda: not head.agents(), what="the end of the agents")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--address head:6379", "the dashboard's, such as http://head:8265"),
        ("--address http://127.0.0.1:1", "the Ray cluster at http://127.0.0.1:1 does not answer"),
        (
            "--address http://me:hidden@head:8265",
            "--address: a user, a password or a token has no place in the address",
        ),
        ("--address http://head:8265/?token=hidden", "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN in the environment"),
        ("--address http://a:1 --cluster c", "--address: cannot stand beside --cluster"),
        ("--cluster gone", "there is no cluster file 'gone'"),
        ("--cluster hostfile", "hosts over ssh keep no list of jobs"),
    ],
)
def test_a_cluster_that_cannot_be_asked_is_named(options: str, says: str, empty_folder: Path) -> None:
    Path("hostfile").write_text("m0 slots=1\n", encoding="utf-8")
    for command in ("runs", "status", "logs", "stop"):
        refused = dltrain(command, *options.split())
        assert refused.code == (1 if "does not answer" in says else 2)
        assert says in " ".join(refused.err.split())
        assert "hidden" not in refused.err


@pytest.mark.parametrize(
    "address", ["http://me:hidden@a:1", "me:hidden@a:1", "https://a:1/?token=hidden", "http://a#hidden"]
)
def test_a_secret_in_a_cluster_file_is_refused_before_anything_is_written(address: str, empty_folder: Path) -> None:
    Path("c.yaml").write_text(f"kind: ray\naddress: '{address}'\n", encoding="utf-8")
    Path("train.py").touch()
    for command in ("submit --cluster c train.py", "submit --cluster c --dry-run train.py", "runs --cluster c"):
        refused = dltrain(*command.split())
        assert refused.code == 2
        assert "c.yaml:2: address: a user, a password or a token has no place" in refused.err
        assert "RAY_AUTH_TOKEN in the environment" in " ".join(refused.err.split())
        assert "hidden" not in refused.out + refused.err
    assert sorted(path.name for path in Path().iterdir()) == ["c.yaml", "train.py"]


def test_code_that_is_too_much_is_refused_with_the_largest_files(empty_folder: Path) -> None:
    Path("c.yaml").write_text("kind: ray\naddress: http://a:1\nlimit_mb: 0.01\n", encoding="utf-8")
    Path("weights.bin").write_bytes(bytes(20_000))
    Path("train.py").touch()
    refused = dltrain("submit", "--cluster", "c", "train.py")
    assert refused.code == 2
    assert "are more than the limit of 0.01 MB" in refused.err
    assert "weights.bin (0.0 MB)" in refused.err
    Path(".gitignore").write_text("*.bin\n", encoding="utf-8")
    shown = dltrain("submit", "--cluster", "c", "--dry-run", "train.py")
    assert shown.code == 0, shown.err
    assert f"{empty_folder} is sent: 3 files" in shown.out
