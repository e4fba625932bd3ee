"""Cluster files: found by name, told apart by what they say, and checked."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from ...core.document import Document, read_document
from ...core.errors import JobError, Problem, did_you_mean
from ...core.suggest import similar_files
from .adapter import Adapter
from .kuberay import KubeRay
from .ray_jobs import RayJobs
from .slurm import Slurm
from .ssh import Ssh
from .vms import Machines

_YAML = (".yaml", ".yml")

#: By the ``kind`` that a file states.
_STATED: dict[str, type[Adapter]] = {"ray": RayJobs, "slurm": Slurm, "RayJob": KubeRay}

#: By the kind in a handle.
KINDS: dict[str, type[Adapter]] = {adapter.kind: adapter for adapter in (RayJobs, Slurm, Ssh, KubeRay, Machines)}

#: The file of each kind in ``cluster_configs``, and what ``dltrain cluster init`` calls its copy.
TEMPLATES = {
    "ray": "ray.yaml",
    "slurm": "slurm.yaml",
    "ssh": "hostfile",
    "kuberay": "kuberay.yaml",
    "aws": "aws.yaml",
    "gcp": "gcp.yaml",
    "azure": "azure.yaml",
    "on-premise": "on-premise.yaml",
}


def template(kind: str) -> str:
    """The text of the commented example file of a kind.

    Raises:
        JobError: there is no such kind.
    """
    if kind not in TEMPLATES:
        raise JobError(Problem(f"no kind of cluster is called '{kind}'", hint=did_you_mean(kind, TEMPLATES)))
    return (resources.files("dltrain") / "cluster_configs" / TEMPLATES[kind]).read_text(encoding="utf-8")


def find_cluster(word: str) -> Path:
    """The cluster file that ``word`` means: a path, or a name in the working directory or the user's configuration.

    Raises:
        JobError: there is none.
    """
    path = Path(word)
    if path.is_file():
        return path
    if path.name == word:
        for home in _homes():
            named = [home / word, *(home / f"{word}{suffix}" for suffix in _YAML)]
            if found := next((candidate for candidate in named if candidate.is_file()), None):
                return found
    hint = similar_files(path, _YAML) or f"dltrain cluster init writes one; names are looked up in {_homes()[1]} too"
    raise JobError(Problem(f"there is no cluster file '{word}'", "--cluster", hint))


def _homes() -> tuple[Path, Path]:
    config = os.environ.get("XDG_CONFIG_HOME")
    return Path(), (Path(config) if config else Path.home() / ".config") / "dltrain" / "clusters"


def read_cluster(path: Path) -> Adapter:
    """The cluster that a file describes.

    Raises:
        JobError: with everything that is wrong with the file.
    """
    if path.suffix not in _YAML:
        return Ssh.read(path, Document(_text(path)))
    document = read_document(path)
    if not isinstance(document.value, dict):
        raise JobError(Problem("expected keys like 'kind: slurm'", str(path), "dltrain cluster init writes an example"))
    return _class_of(document, path).read(path, document)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(Problem(f"cannot be read: {error}", str(path))) from None


def _class_of(document: Document, path: Path) -> type[Adapter]:
    value: dict[str, Any] = document.value
    if "kind" in value:
        kind = value["kind"]
        if isinstance(kind, str) and kind in _STATED:
            return _STATED[kind]
        where = f"{path}:{document.lines[('kind',)]}: kind"
        raise JobError(Problem(f"no kind of cluster is called '{kind}'", where, did_you_mean(str(kind), _STATED)))
    if "provider" in value or "cluster_name" in value:
        return Machines
    hint = f"one of {', '.join(_STATED)}; a file of Ray's cluster launcher has 'provider' instead"
    raise JobError(Problem("'kind' is missing", str(path), hint))
