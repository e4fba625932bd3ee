"""A real Slurm on machines made of this one: a controller on the first, a node daemon on each, and one munge."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dltrain.launcher.chaos import machines
from dltrain.launcher.chaos.machines import Machine
from launching import wait_for

_SBIN = "/usr/sbin:/sbin"
_NEEDS = ("sbatch", "srun", "scontrol", "slurmctld", "slurmd", "munged", "create-munge-key", "getent", "od")


def why_not() -> str:
    """What is missing here for a Slurm; empty where nothing is."""
    path = f"{os.environ['PATH']}:{_SBIN}"
    missing = [name for name in _NEEDS if shutil.which(name, path=path) is None and name != "create-munge-key"]
    if missing:
        return f"needs {', '.join(missing)} (Debian: slurm-wlm, munge)"
    if os.geteuid():
        return "needs root, for the daemons"
    return machines.why_not()


@dataclass(frozen=True)
class SlurmCluster:
    """A Slurm that is up. ``environ`` is what its commands need, on any of ``machines``."""

    machines: Sequence[Machine]
    environ: dict[str, str]

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        env = os.environ | self.environ
        done = subprocess.run(
            [*self.machines[0].prefix, *command], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout + done.stderr

    def fields(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        pairs = (word.partition("=") for word in self.ask("scontrol", "show", "job", "--oneliner", job).split())
        return {name: value for name, _, value in pairs}


@contextmanager
def slurm(count: int, cpus: int) -> Iterator[SlurmCluster]:
    """Slurm over ``count`` machines of ``cpus`` CPUs each; a requeued job may run again after ten seconds."""
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
    try:
        with ExitStack() as stack:
            nodes = stack.enter_context(machines.machines(count))
            _write_conf(folder, nodes, cpus)
            environ = {"SLURM_CONF": str(folder / "slurm.conf")}
            (folder / "munge").mkdir(mode=0o700)
            key = folder / "munge/key"
            key.write_bytes(os.urandom(128))
            key.chmod(0o400)
            files = (f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed"))
            munge = ("munged", "--foreground", "--force", f"--socket={folder}/munge/socket", *files)
            stack.enter_context(_daemon(munge, folder / "munged.out", environ))
            wait_for((folder / "munge/socket").exists, what="munged")
            stack.enter_context(_daemon((*nodes[0].prefix, "slurmctld", "-D"), folder / "slurmctld.out", environ))
            for node in nodes:
                command = (*node.prefix, "slurmd", "-D", "-N", node.name)
                stack.enter_context(_daemon(command, folder / f"{node.name}.out", environ))
            cluster = SlurmCluster(nodes, environ)
            wait_for(lambda: cluster.ask("sinfo", "-h", "-o", "%D %T").strip() == f"{count} idle", what="idle nodes")
            stack.callback(_end_jobs, nodes)
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end_jobs(nodes: Sequence[Machine]) -> None:
    """Kill what is left on the machines: Slurm's own job managers outlive its daemons."""
    for pid in (pid for node in nodes for pid in node.processes()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _write_conf(folder: Path, nodes: Sequence[Machine], cpus: int) -> None:
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={nodes[0].name}({nodes[0].address})",
        "SlurmUser=root",
        f"AuthInfo=socket={folder}/munge/socket,cred_expire=10",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "KillWait=20",
        *(f"NodeName={n.name} NodeHostname={n.name} NodeAddr={n.address} CPUs={cpus}" for n in nodes),
        "PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=60",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextmanager
def _daemon(command: Sequence[str], log: Path, environ: dict[str, str]) -> Iterator[None]:
    env = os.environ | environ | {"PATH": f"{os.environ['PATH']}:{_SBIN}"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
