"""Kubernetes with KubeRay: a RayJob made of the user's manifest, and a ConfigMap with the code of the job."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import secrets
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from ...core.document import Document
from ...core.errors import JobError, Problem, RunFailed
from .adapter import Adapter, JobState, Standing, place
from .code import Code, code_of, dltrain_code
from .handle import Handle
from .schemas import RAY_JOB, faults
from .steps import Steps, Submission

_RUNS = "dltrain/runs"  # the annotation that says where runs are
_JOB, _GRACE = "dltrain/job", "dltrain/stop-grace"  # those by which a job is found again
_LIMIT_MB = 0.7  # of a ConfigMap's 1 MiB, a third goes to its text form
_PATIENCE = 60.0  # seconds for an answer of kubectl
_CODE = "/dltrain"
_WORD = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_NO_TEXT = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
_STANDING: dict[str, Standing] = {
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "STOPPED": "stopped",
    "RUNNING": "running",
}


class KubeRay(Adapter):
    """A Kubernetes cluster with the KubeRay operator, that kubectl reaches."""

    kind = "kuberay"

    def __init__(self, manifest: dict[str, Any], path: Path) -> None:
        self._manifest, self._path = manifest, path

    @classmethod
    def read(cls, path: Path, document: Document) -> KubeRay:
        """The RayJob of a file.

        Raises:
            JobError: with everything that is wrong in it.
        """
        problems = faults(document, RAY_JOB, path)
        if not problems:
            spec, annotations = document.value["spec"], document.value["metadata"].get("annotations", {})
            if not spec["rayClusterSpec"].get("workerGroupSpecs"):
                where = place(document, path, ("spec", "rayClusterSpec"))
                problems.append(Problem("there is no group of workers", where, "workerGroupSpecs has the ranks' pods"))
            if not str(annotations.get(_RUNS, "")).startswith("/"):
                what = f"the annotation '{_RUNS}' is missing"
                hint = f"{_RUNS}: /runs, a folder that all pods mount"
                problems.append(Problem(what, place(document, path, ("metadata",)), hint))
            ours = [name for name in ("entrypoint", "jobId", "suspend") if name in spec]
            hint = "dltrain submit sets this itself"
            where = {name: place(document, path, ("spec", name)) for name in ours}
            problems += [Problem("this is not the file's to say", where[name], hint) for name in ours]
        if problems:
            raise JobError(*problems)
        return cls(document.value, path)

    def check(self) -> list[str]:
        """What the file says, checked against what KubeRay allows; Kubernetes is not asked."""
        workers = self._manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        image = workers["template"]["spec"]["containers"][0]["image"]
        return [f"a RayJob of KubeRay, ranks in pods of {image}"]

    def render(self, submission: Submission) -> Steps:
        """The manifests, and the command that takes them; of the code its size only.

        Raises:
            JobError: the code does not fit, or variables would have to travel.
        """
        code, own = self._code(submission)
        shown = self._config_map("ID", "UID", "(code and dltrain, packed)")
        create = shlex.join(_create(self._namespace))
        return Steps(
            commands=(create, create),
            files={
                "(standard input of kubectl)": _text(self._job(submission, "ID")),
                "(standard input of the second kubectl)": _text(shown),
            },
            notes=(f"{submission.folder} is sent: {code}", f"dltrain is sent: {own}"),
        )

    def hand_over(self, submission: Submission, say: Callable[[str], None]) -> Handle:
        """Create ConfigMap and RayJob.

        Raises:
            JobError: the code does not fit, or variables would have to travel.
            RunFailed: there is no kubectl, or it does not take them.
        """
        code, own = self._code(submission)
        packed = _packed({"code": code, "site/dltrain": own})
        if len(packed) > _LIMIT_MB * 1e6:
            what = f"code and dltrain are {len(packed) / 1e6:.2f} MB packed; a ConfigMap takes {_LIMIT_MB} MB"
            raise JobError(Problem(what, str(submission.folder), "name in .gitignore what the job does not need"))
        number = secrets.token_hex(3)
        say(f"sending {submission.folder}: {code}")
        done = _kubectl(_create(self._namespace), text=_text(self._job(submission, number)))
        if done.returncode:
            raise RunFailed(f"kubectl has not taken the job: {done.stderr.strip()}")
        uid = str(json.loads(done.stdout)["metadata"]["uid"])
        config = self._config_map(number, uid, base64.b64encode(packed).decode())
        done = _kubectl(_create(self._namespace), text=_text(config))  # until it is there, the pods wait
        if done.returncode:
            _kubectl(("kubectl", *self._flags, "delete", "rayjob", self._name(number), "--wait=false"))
            raise RunFailed(f"kubectl has not taken the job's code: {done.stderr.strip()}")
        runs = str(self._manifest["metadata"]["annotations"][_RUNS])
        where = {"name": self._name(number), "namespace": self._namespace}
        return submission.handle(self.kind, number, where, runs=runs)

    def jobs(self) -> list[tuple[Handle, JobState]]:
        """The RayJobs of dltrain in the file's namespace; raises RunFailed where Kubernetes does not answer."""
        done = _kubectl(("kubectl", *self._flags, "get", "rayjobs", "--output=json"))
        if done.returncode:
            raise RunFailed(f"Kubernetes does not list its RayJobs: {done.stderr.strip()}")
        found: list[tuple[Handle, JobState]] = []
        for item in json.loads(done.stdout)["items"]:
            metadata: dict[str, Any] = item["metadata"]
            said: dict[str, str] = metadata.get("annotations", {})
            if _JOB not in said:
                continue
            since = datetime.fromisoformat(metadata["creationTimestamp"]).timestamp()
            where = {"name": metadata["name"], "namespace": metadata.get("namespace", "")}
            number, grace = metadata["name"].rpartition("-")[2], float(said[_GRACE])
            handle = Handle(self.kind, number, said[_JOB], where, since, said[_RUNS], grace)
            found.append((handle, _state(item.get("status", {}))))
        return found

    @property
    def _flags(self) -> tuple[str, ...]:
        return (f"--namespace={self._namespace}",) if self._namespace else ()

    @property
    def _namespace(self) -> str:
        return str(self._manifest["metadata"].get("namespace", ""))

    def _name(self, number: str) -> str:
        return f"{self._manifest['metadata']['name']}-{number}"

    def _code(self, submission: Submission) -> tuple[Code, Code]:
        if names := submission.job_variables():
            hint = "say it as key=value: the environment does not travel to Kubernetes"
            raise JobError(Problem("set here, but not where the job runs", ", ".join(names), hint))
        return code_of(submission.folder, without=submission.runs, limit_mb=10.0), dltrain_code()

    def _config_map(self, number: str, uid: str, packed: str) -> dict[str, Any]:
        """The ConfigMap with the code, which goes when its RayJob ``uid`` does."""
        name = self._name(number)
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": uid}
        metadata: dict[str, Any] = {"name": name, "ownerReferences": [owner]}
        if self._namespace:
            metadata["namespace"] = self._namespace
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "binaryData": {"code.zip": packed}}

    def _job(self, submission: Submission, number: str) -> dict[str, Any]:
        job = copy.deepcopy(self._manifest)
        name = self._name(number)
        job["metadata"]["name"] = name
        job["metadata"]["annotations"] |= {_JOB: submission.name, _GRACE: str(submission.stop_grace)}
        spec = job["spec"]
        runs = f"--run-dir={job['metadata']['annotations'][_RUNS]}"
        words = ("launch", *submission.options, runs, "--address=auto", f"--submission={self.kind}-{number}")
        spec["entrypoint"] = shlex.join(
            ["env", "-C", f"{_CODE}/code", "python", "-P", "-m", "dltrain.cli", *words, *submission.words]
        )
        spec["jobId"] = name
        cluster = spec["rayClusterSpec"]
        workers = cluster["workerGroupSpecs"][0]
        nodes = submission.machines
        workers |= {"replicas": nodes, "minReplicas": nodes, "maxReplicas": nodes}
        wait = {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": f"{submission.stop_grace + 120:.0f}"}
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            _bring_code(group["template"]["spec"], name, wait)
        return job

    @staticmethod
    def state(handle: Handle) -> JobState:
        """How the job stands.

        Raises:
            RunFailed: Kubernetes does not answer.
        """
        status = _status(handle)
        if status is None:
            return JobState("unknown", "Kubernetes does not have it any more")
        return _state(status)

    @staticmethod
    def output(handle: Handle, *, follow: bool) -> Iterator[bytes]:
        """What the job's submitter, which repeats the driver, has printed.

        Raises:
            RunFailed: Kubernetes has no log of it.
        """
        flags = ("--follow", "--pod-running-timeout=24h") if follow else ()
        command = ("kubectl", *_in(handle), "logs", *flags, f"job/{handle.cluster['name']}")
        _require_kubectl()
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                yield from process.stdout
            except BaseException:  # nobody wants to read on
                process.terminate()
                raise
        if process.returncode:
            raise RunFailed(f"kubectl logs ended with {process.returncode}")

    @staticmethod
    def stop(handle: Handle, *, now: bool) -> None:
        """Have Ray signal the driver, or delete the job ``now``, and also where it has no head yet.

        Raises:
            RunFailed: Kubernetes refuses.
        """
        name = str(handle.cluster["name"])
        cluster = (_status(handle) or {}).get("rayClusterName", "")
        labels = f"--selector=ray.io/cluster={cluster},ray.io/node-type=head"
        pods = _kubectl(("kubectl", *_in(handle), "get", "pods", labels, "--output=name")).stdout.split()
        if now or not cluster or not pods:
            done = _kubectl(("kubectl", *_in(handle), "delete", "rayjob", name, "--wait=false"))
        else:
            stop = ("ray", "job", "stop", "--no-wait", name)
            done = _kubectl(("kubectl", *_in(handle), "exec", pods[0], "--", *stop))
        if done.returncode:
            raise RunFailed(f"kubectl has not stopped {name}: {done.stderr.strip()}")


def _state(status: Mapping[str, Any]) -> JobState:
    job, deployment = str(status.get("jobStatus", "")), str(status.get("jobDeploymentStatus", ""))
    standing = "failed" if deployment == "Failed" and job != "STOPPED" else _STANDING.get(job, "queued")
    return JobState(standing, ", ".join(filter(None, [job, deployment, str(status.get("message", ""))])))


def _status(handle: Handle) -> dict[str, Any] | None:
    """What KubeRay says of a job; None where there is none of that name."""
    name = str(handle.cluster["name"])
    done = _kubectl(("kubectl", *_in(handle), "get", "rayjob", name, "--ignore-not-found", "--output=json"))
    if done.returncode:
        raise RunFailed(f"Kubernetes does not say how {name} stands: {done.stderr.strip()}")
    return json.loads(done.stdout).get("status", {}) if done.stdout.strip() else None


def _bring_code(pod: dict[str, Any], name: str, variable: Mapping[str, str]) -> None:
    """Have a pod unpack the ConfigMap ``name`` before its first container begins, which then finds it."""
    first = pod["containers"][0]
    code = {"name": "dltrain-code", "mountPath": _CODE}
    unpack = {
        "name": "dltrain-code",
        "image": first["image"],
        "command": ["python", "-m", "zipfile", "-e", f"{_CODE}-package/code.zip", _CODE],
        "volumeMounts": [{"name": "dltrain-package", "mountPath": f"{_CODE}-package"}, code],
    }
    volumes: list[dict[str, Any]] = [
        {"name": "dltrain-code", "emptyDir": {}},
        {"name": "dltrain-package", "configMap": {"name": name}},
    ]
    pod["initContainers"] = [*pod.get("initContainers", []), unpack]
    pod["volumes"] = [*pod.get("volumes", []), *volumes]
    first["volumeMounts"] = [*first.get("volumeMounts", []), code]
    paths = [entry["value"] for entry in first.get("env", []) if entry["name"] == "PYTHONPATH" and "value" in entry]
    others = [entry for entry in first.get("env", []) if entry["name"] != "PYTHONPATH"]
    path = {"name": "PYTHONPATH", "value": ":".join([f"{_CODE}/site", *paths])}
    first["env"] = [*others, path, dict(variable)]


def _packed(parts: Mapping[str, Code]) -> bytes:
    """The files of each part below its name, as a zip."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, code in parts.items():
            archive.writestr(f"{name}/", b"")
            for file in code.files:
                archive.write(code.folder / file, f"{name}/{file}")
    return out.getvalue()


def _text(manifest: Mapping[str, Any]) -> str:
    out = io.StringIO()
    yaml: Any = YAML()
    yaml.default_flow_style = False
    yaml.Representer = _Representer
    yaml.width = 1 << 30
    yaml.dump(manifest, out)
    return out.getvalue()


class _Representer(RoundTripRepresenter):
    """Puts text in quotes unless it is a plain word: to kubectl, which reads YAML 1.1, a bare ``yes`` is no text."""

    def represent_str(self, data: str) -> Any:
        plain = _WORD.fullmatch(data) and data.lower() not in _NO_TEXT
        node: Any = self
        return node.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else "'")

    def ignore_aliases(self, data: Any) -> bool:
        return True


_untyped: Any = _Representer
_untyped.add_representer(str, _Representer.represent_str)


def _create(namespace: str) -> tuple[str, ...]:
    # not apply, which would keep a second copy of the code in an annotation
    return ("kubectl", *((f"--namespace={namespace}",) if namespace else ()), "create", "--output=json", "--filename=-")


def _in(handle: Handle) -> tuple[str, ...]:
    namespace = str(handle.cluster.get("namespace", ""))
    return (f"--namespace={namespace}",) if namespace else ()


def _require_kubectl() -> None:
    if shutil.which("kubectl") is None:
        raise RunFailed("there is no kubectl here")


def _kubectl(command: tuple[str, ...], *, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run kubectl.

    Raises:
        RunFailed: it is not there, or it does not answer.
    """
    _require_kubectl()
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"kubectl has not answered within {_PATIENCE:g} s") from None
