"""What makes an agent a node of a run: a warm fork server, the same versions, and a view of the checkpoints."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import JobError, Problem
from . import untyped
from .cluster import ClusterError, loss_of
from .messages import NodeInfo

LEASE = 15.0
"""Seconds without a call from the controller after which an agent of an existing cluster ends its ranks."""

_LAG = 5.0  # seconds until a file that was just made is seen on every machine that shares the folder


class Probe:
    """A file in a folder that nodes are asked whether they see it; it is there until :meth:`close`.

    Raises:
        ClusterError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        token = secrets.token_hex(8)
        self._file = folder / f".probe-{token}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file.write_text(token, encoding="utf-8")
        except OSError as error:
            raise ClusterError(f"{folder} cannot be written: {error.strerror or error}") from error
        self.question = (str(self._file), token, _LAG)
        """The arguments of the agent's ``sees``."""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a file system that fails now is told of where it matters
            self._file.unlink()


@dataclass
class Enlisting:
    """An agent that gets ready, as far as it has come: the references to its answers. :meth:`close` it in the end."""

    agent: Any
    prepared: Any
    described: Any
    adopted: Any
    probe: Probe | None
    versions: Mapping[str, str]
    _sees: list[Any] = field(default_factory=list[Any])

    def __post_init__(self) -> None:
        if self.probe is not None:
            self._sees = [self.agent.sees.remote(*self.probe.question)]

    def ready(self) -> NodeInfo | None:
        """The node, once it can start ranks; None while it cannot yet.

        Raises:
            DltrainError: it was lost, does not match the others, or does not see the checkpoints.
        """
        ray = untyped.ray()
        refs = [self.prepared, self.described, self.adopted, *self._sees]
        done, rest = ray.wait(refs, num_returns=len(refs), timeout=0)
        try:
            ray.get(done)
            if rest:
                return None
            facts, info, shares, *sees = ray.get(refs)
        except ray.exceptions.RayError as error:
            raise ClusterError(loss_of(error)) from error
        check_servers([info], [facts])
        info = with_torch(info, facts)
        check_versions([info], self.versions)
        if not all(sees):
            raise ClusterError(f"{info.hostname} does not see the folder of the checkpoints")
        return replace(info, shares_run_dir=shares)

    def close(self) -> None:
        if self.probe is not None:
            self.probe.close()


def check_versions(nodes: Sequence[NodeInfo], wanted: Mapping[str, str]) -> None:
    """Refuse nodes whose versions differ from ``wanted``, or whose dltrain is not this process's.

    Raises:
        JobError: one does.
    """
    from .. import __version__

    for node in nodes:
        for name, version in node.versions.items():
            right = __version__ if name == "dltrain" else wanted[name]
            if version != right:
                what = f"node {node.node} ({node.hostname}) has {name} {version}, not {right}"
                raise JobError(Problem(what, "--address", f"install {name} {right} there"))


def with_torch(node: NodeInfo, facts: Mapping[str, Any]) -> NodeInfo:
    """A node with its version of torch too, of which its fork server knows."""
    return replace(node, versions={**node.versions, "torch": facts["torch"]})


def check_servers(nodes: Sequence[NodeInfo], servers: Sequence[Mapping[str, Any]]) -> None:
    """Refuse fork servers that cannot fork safely.

    Raises:
        ClusterError: one cannot.
    """
    for node, facts in zip(nodes, servers, strict=True):
        if facts["threads"] != 1:
            raise ClusterError(f"node {node.node}: its fork server runs {facts['threads']} threads: forks are unsafe")
