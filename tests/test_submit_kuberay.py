"""Jobs for KubeRay: the manifest against KubeRay's fields, what kubectl is given, and how the job is asked after.

There is no Kubernetes here: a kubectl that records stands on the path, and answers as the real one does.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Generator
from pathlib import Path
from typing import cast

import pytest
from command import dltrain
from dltrain.core.document import Document
from dltrain.launcher.submit.clusters import template
from dltrain.launcher.submit.handle import Handle
from dltrain.launcher.submit.jobs import output_of
from dltrain.launcher.submit.schemas import RAY_JOB, faults
from launching import BIN
from ruamel.yaml import YAML

KUBECTL = """\
#!/bin/sh
echo "$@" >>kubectl.calls
case "$*" in
*create*) cat >>manifests.yaml; echo --- >>manifests.yaml; echo '{"metadata": {"uid": "u-1"}}' ;;
*"get rayjobs"*) cat list.json ;;
*"get rayjob"*) cat status.json ;;
*"get pods"*) echo pod/head-1 ;;
*logs*) echo step 1/3 ;;
*"job stop"*) echo '{"status": {"jobStatus": "STOPPED"}}' >status.json ;;
esac
"""


@pytest.fixture
def folder(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    kubectl = empty_folder / "bin/kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(KUBECTL, encoding="utf-8")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{kubectl.parent}:/usr/bin:/bin")
    (empty_folder / "k.yaml").write_text(template("kuberay"), encoding="utf-8")
    (empty_folder / "my_recipe.py").write_text("WORD = 'mine'\n", encoding="utf-8")
    return empty_folder


def test_a_job_is_created_with_its_code_and_asked_after(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = dltrain("submit", "--cluster", "k", "--nodes", "3", "name=net", "train.steps=3")
    assert done.code == 0, done.err
    name = "dltrain-" + done.out.partition("net/kuberay-")[2].split()[0]
    job, config, _ = YAML(typ="safe").load_all(Path("manifests.yaml").read_text(encoding="utf-8"))
    assert not faults(Document(job), RAY_JOB, Path("made"))
    assert (config["metadata"]["name"], job["metadata"]["name"], job["spec"]["jobId"]) == (name, name, name)
    assert config["metadata"]["ownerReferences"][0]["uid"] == "u-1"
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [3, 3, 3]

    with zipfile.ZipFile(io.BytesIO(base64.b64decode(config["binaryData"]["code.zip"]))) as archive:
        archive.extractall(folder / "pod")
    assert (folder / "pod/code/my_recipe.py").exists()
    entrypoint = job["spec"]["entrypoint"].replace("/dltrain/code", str(folder / "pod/code")).split()
    words = [*entrypoint[: entrypoint.index("launch")], "--version"]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(folder / "pod/site"))
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.startswith("dltrain 0")
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")

    for status, says, code in (
        ({}, "queued", 0),
        ({"status": {"jobDeploymentStatus": "Initializing"}}, "queued (Initializing)", 0),
        ({"status": {"jobStatus": "RUNNING", "jobDeploymentStatus": "Running"}}, "running (RUNNING, Running)", 0),
        ({"status": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}, "failed (FAILED, Failed)", 1),
    ):
        Path("status.json").write_text(json.dumps(status), encoding="utf-8")
        asked = dltrain("status")
        assert (asked.code, asked.out.split("  ")[1].strip()) == (code, says), asked.err
    Path("status.json").write_text('{"status": {"jobStatus": "RUNNING", "rayClusterName": "c-1"}}', encoding="utf-8")
    stopped = dltrain("stop", "net")
    assert stopped.code == 0, stopped.err
    assert f"net/kuberay-{name.removeprefix('dltrain-')}: stopped (STOPPED)" in stopped.out
    calls = Path("kubectl.calls").read_text(encoding="utf-8")
    assert "get pods --selector=ray.io/cluster=c-1,ray.io/node-type=head --output=name" in calls
    assert f"exec pod/head-1 -- ray job stop --no-wait {name}" in calls


def test_a_log_that_is_followed_is_let_go(folder: Path) -> None:
    follows = "#!/bin/sh\ntrap 'touch ended; exit' TERM\necho step 1/3\nsleep 5 >&- & wait\n"
    (folder / "bin/kubectl").write_text(follows, encoding="utf-8")
    pieces = output_of(Handle("kuberay", "7", "net", {"name": "dltrain-7"}), follow=True)
    assert next(pieces) == b"step 1/3\n"
    cast("Generator[bytes]", pieces).close()
    assert Path("ended").exists()


def test_jobs_are_found_in_kubernetes_where_no_handle_is(folder: Path) -> None:
    assert dltrain("submit", "--cluster", "k", "name=net", "train.steps=3").code == 0
    job = next(YAML(typ="safe").load_all(Path("manifests.yaml").read_text(encoding="utf-8")))
    status = {"status": {"jobStatus": "RUNNING", "jobDeploymentStatus": "Running", "rayClusterName": "c-1"}}
    job["metadata"]["creationTimestamp"] = "2026-01-02T03:04:05Z"
    others = {"metadata": {"name": "other", "creationTimestamp": "2026-01-02T03:04:06Z"}}
    Path("list.json").write_text(json.dumps({"items": [job | status, others]}), encoding="utf-8")
    Path("status.json").write_text(json.dumps(status), encoding="utf-8")
    shutil.rmtree("runs")
    listed = dltrain("runs", "--cluster", "k", "--json")
    (row,) = json.loads(listed.out)
    key = "kuberay-" + job["metadata"]["name"].rpartition("-")[2]
    assert row == {"name": f"net/{key}", "state": "running", "step": 0, "since": 1767323045.0, "job": key}
    assert dltrain("status", "net", "--cluster", "k").out == f"net/{key}  running (RUNNING, Running)\n"
    shown = subprocess.run([BIN / "dltrain", "logs", key, "--cluster", "k"], capture_output=True, text=True, check=True)
    assert shown.stdout == "step 1/3\n"
    assert f"net/{key}: stopped (STOPPED)" in dltrain("stop", "--cluster", "k").out
    unknown = dltrain("status", "nett", "--cluster", "k")
    assert unknown.code == 2
    assert "the cluster knows no job 'nett'" in unknown.err


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("replicas", "replicas", ""),
        ("rayVersion:", "rayVerison:", "spec.rayClusterSpec.rayVerison: unknown key 'rayVerison'"),
        ("image: registry.example/training:latest\n              resources", "resources", "'image' is missing"),
        ("dltrain/runs: /runs", "other: there", "the annotation 'dltrain/runs' is missing"),
        ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: yes", "expected a value of type boolean"),
        ("#envFrom:", "env: [{value: x}]", "'name' is missing"),
        ("ray.io/v1", "ray.io/v2", "'ray.io/v1' was expected"),
        ("  #activeDeadlineSeconds: 86400", "  entrypoint: python x.py", "this is not the file's to say"),
    ],
)
def test_a_manifest_is_checked_by_line(old: str, new: str, says: str, folder: Path) -> None:
    text = Path("k.yaml").read_text(encoding="utf-8").replace(old, new, 1)
    Path("k.yaml").write_text(text, encoding="utf-8")
    done = dltrain("cluster", "check", "k")
    assert done.code == (2 if says else 0), done.out
    assert says in done.err
    assert not says or "k.yaml:" in done.err


def test_what_does_not_fit_a_configmap_is_refused(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 100 + os.urandom(600_000))
    done = dltrain("submit", "--cluster", "k")
    assert done.code == 2
    assert "a ConfigMap takes 0.7 MB" in done.err
    assert not Path("kubectl.calls").exists()
