"""Submitted jobs found by asking their cluster, on a machine that has no handle of them."""

from __future__ import annotations

from pathlib import Path

from ...core.errors import JobError, Problem, did_you_mean
from .adapter import Adapter
from .clusters import find_cluster, read_cluster
from .handle import Handle
from .handles import run_of
from .ray_jobs import RayJobs


def cluster_at(address: str | None, file: str | None) -> Adapter | None:
    """The cluster to ask: that whose dashboard is at ``address``, or that of a cluster file or its name; else None.

    Raises:
        JobError: both are given, the address is no URL, or there is no such file or it is wrong.
    """
    if address is not None and file is not None:
        raise JobError(Problem("cannot stand beside --cluster", "--address", "the cluster file says where to ask"))
    if address is not None:
        return RayJobs.at(address)
    return None if file is None else read_cluster(find_cluster(file))


def find_in(cluster: Adapter, word: str | None) -> Handle:
    """The job of ``cluster`` that ``word`` names: ``name/kind-id``, ``kind-id`` or the cluster's own name for it.

    A job's name means its newest submission, and None the newest of all.

    Raises:
        JobError: there is none.
        RunFailed: nobody answers.
    """
    handles = [handle for handle, _ in cluster.jobs()]
    exact = [handle for handle in handles if word in _words(handle)]
    same = exact or [handle for handle in handles if word in (None, handle.name)]
    if not same:
        known = {name for handle in handles for name in (handle.name, f"{handle.name}/{handle.key}")}
        what = f"the cluster knows no job '{word}'" if word else "the cluster knows no job of dltrain"
        raise JobError(Problem(what, hint=did_you_mean(word, known) if word else ""))
    return max(same, key=lambda handle: handle.submitted)


def names_job(handle: Handle, word: str | None) -> bool:
    """Whether ``word`` names this very job, and not all that go by its name."""
    return word in _words(handle)


def run_seen(handle: Handle) -> Path | None:
    """The job's run directory, where its cluster's runs folder is seen from here too."""
    return run_of(Path(handle.runs), handle) if handle.runs else None


def _words(handle: Handle) -> tuple[str, ...]:
    return f"{handle.name}/{handle.key}", handle.key, handle.id
