"""What many launches are tried on: a Ray cluster on this machine, with a fork server that stays warm between them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from ...core.job import Job
from .. import untyped
from ..cluster import Cluster, session_folder
from ..demand import Demand, demand_here
from ..host import ForkServer, server_name
from ..machine import rank_environment

_ROOM = 2  # times what a run takes: the one before may not have given back all yet


class Stand(ABC):
    """A Ray cluster for launches. Enter it to have the cluster; leave it and everything is gone.

    Attributes:
        demand: what each launch asks for.
        address: of the cluster, for ``--address``.
        placement: how nodes are to be placed.
        prefix: what to put before a launch.
        options: more of its options.
    """

    placement: str
    address: str = ""
    prefix: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __init__(self, demand: Demand) -> None:
        self.demand = demand

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def ready(self) -> None:
        """Make it as good as new for the next launch.

        Raises:
            ClusterError: that cannot be done.
        """


class OneMachine(Stand):
    """This machine alone, with all nodes on it."""

    placement = "pack"

    def __init__(self, job: Job, interrupted: Callable[[], None]) -> None:
        super().__init__(demand_here(job.resources, job.recovery.spares))
        self._timeout = job.recovery.start_timeout
        self._cluster = Cluster(None, self._timeout, interrupted)
        self._server: ForkServer | None = None

    def __enter__(self) -> Self:
        self._cluster.check_process()
        self._cluster.folder = session_folder()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._cluster.close()
        finally:
            if self._server is not None:
                self._server.close()

    def ready(self) -> None:
        """Nothing that is played here leaves it otherwise."""

    def _start(self) -> None:
        """Start Ray, and hold a lease on the fork server that its nodes' agents will ask for.

        Raises:
            ClusterError: Ray did not start.
            HostError: the fork server did not.
        """
        cluster = self._cluster
        cluster.connect(replace(self.demand, cpus=self.demand.cpus * _ROOM))
        ray = untyped.ray()
        self.address = ray.get_runtime_context().gcs_address
        asked = ray.remote(_environment).options(num_cpus=0).remote()
        node: dict[str, str] = cluster.gather([asked], waiting_for="its environment")[0]
        environ = rank_environment(dict(os.environ), node, same_machine=False)
        self._server = ForkServer.start(server_name("", environ), environ, self._timeout)
        assert cluster.folder is not None
        self._server.guard(cluster.folder)
        self._server.hello(keep_warm=0, timeout=self._timeout)


def _environment() -> dict[str, Any]:
    return dict(os.environ)
