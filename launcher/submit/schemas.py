"""What a JSON schema says of a YAML file: validation with the file's lines, and the schemas of others that we use."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.document import Document
from ...core.errors import Problem, did_you_mean
from .adapter import place

#: Of Kubernetes' own objects only the parts that Ray's pods cannot be without.
_POD = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["containers"],
            "properties": {
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "image"],
                        "properties": {
                            "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
                            "image": {"type": "string", "minLength": 1},
                            "env": {"type": "array", "items": {"type": "object", "required": ["name"]}},
                            "resources": {"type": "object"},
                            "volumeMounts": {"type": "array"},
                        },
                    },
                },
                "initContainers": {"type": "array"},
                "volumes": {"type": "array"},
            },
        },
    },
}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}
_HEAD = {
    "type": "object",
    "required": ["rayStartParams", "template"],
    "additionalProperties": False,
    "properties": {
        "serviceType": {"type": "string"},
        "headService": {"type": "object"},
        "enableIngress": {"type": "boolean"},
        "labels": _TEXTS,
        "resources": _TEXTS,
        "rayStartParams": _TEXTS,
        "template": _POD,
    },
}
_WORKERS = {
    "type": "object",
    "required": ["groupName", "rayStartParams", "template"],
    "additionalProperties": False,
    "properties": {
        "groupName": {"type": "string", "minLength": 1},
        "replicas": _COUNT,
        "minReplicas": _COUNT,
        "maxReplicas": _COUNT,
        "numOfHosts": {"type": "integer", "minimum": 1},
        "idleTimeoutSeconds": _COUNT,
        "suspend": {"type": "boolean"},
        "labels": _TEXTS,
        "resources": _TEXTS,
        "rayStartParams": _TEXTS,
        "template": _POD,
        "scaleStrategy": {"type": "object"},
    },
}
_CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": {"type": "object"},
        "headServiceAnnotations": _TEXTS,
        "gcsFaultToleranceOptions": {"type": "object"},
        "authOptions": {"type": "object"},
        "suspend": {"type": "boolean"},
        "managedBy": {"type": "string"},
        "headGroupSpec": _HEAD,
        "workerGroupSpecs": {"type": "array", "items": _WORKERS},
    },
}

#: A RayJob of KubeRay, API ``ray.io/v1``: the fields of ``RayJobSpec``, ``RayClusterSpec``, ``HeadGroupSpec`` and
#: ``WorkerGroupSpec`` in ``ray-operator/apis/ray/v1/rayjob_types.go`` and ``raycluster_types.go`` (KubeRay 1.4), of the
#: pods within only what every pod has. Kubernetes itself checks the rest when the manifest is applied.
RAY_JOB: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 24},
                "namespace": {"type": "string"},
                "labels": _TEXTS,
                "annotations": _TEXTS,
            },
        },
        "spec": {
            "type": "object",
            "required": ["rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
                "backoffLimit": _COUNT,
                "rayClusterSpec": _CLUSTER,
                "submitterPodTemplate": _POD,
                "submitterConfig": {"type": "object"},
                "metadata": _TEXTS,
                "managedBy": {"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
                "deletionStrategy": {"type": "object"},
                "entrypoint": {"type": "string"},
                "runtimeEnvYAML": {"type": "string"},
                "jobId": {"type": "string"},
                "submissionMode": {"const": "K8sJobMode"},  # others exist; its job's log is where a driver prints to
                "entrypointResources": {"type": "string"},
                "entrypointNumCpus": {"type": "number"},
                "entrypointNumGpus": {"type": "number"},
                "ttlSecondsAfterFinished": _COUNT,
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "suspend": {"type": "boolean"},
            },
        },
    },
}


def ray_launcher() -> dict[str, Any]:
    """The schema of the cluster launcher's files (``ray up``), of the Ray that is installed."""
    home = Path(str(importlib.import_module("ray").__file__)).parent
    return json.loads((home / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))


def faults(document: Document, schema: Mapping[str, Any], path: Path) -> list[Problem]:
    """Where the file ``document``, read from ``path``, is not what ``schema`` says."""
    validators: Any = importlib.import_module("jsonschema.validators")
    validator = validators.validator_for(schema)(schema)
    found = sorted(validator.iter_errors(document.value), key=lambda error: [str(part) for part in error.absolute_path])
    return [problem for error in found for problem in _worded(error, document, path)]


def _worded(error: Any, document: Document, path: Path) -> list[Problem]:
    key = tuple(str(part) for part in error.absolute_path)
    if error.validator != "additionalProperties" or not isinstance(error.validator_value, bool):
        return [Problem(_short(error), place(document, path, key))]
    known = error.schema.get("properties", {})
    unknown = [name for name in error.instance if name not in known]
    return [
        Problem(f"unknown key '{name}'", place(document, path, (*key, str(name))), did_you_mean(str(name), known))
        for name in unknown
    ]


def _short(error: Any) -> str:
    match error.validator:
        case "required":
            missing = [name for name in error.validator_value if name not in error.instance]
            return f"{' and '.join(repr(name) for name in missing)} is missing"
        case "type":
            return f"expected {_a(error.validator_value)}, found {_cut(error.instance)}"
        case "pattern":
            return f"{_cut(error.instance)} does not match {error.validator_value}"
        case _:
            return str(error.message).splitlines()[0][:200]


def _a(kind: Any) -> str:
    return " or ".join(kind) if isinstance(kind, list) else f"a value of type {kind}"  # pyright: ignore[reportUnknownArgumentType]  # a schema's own list


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
