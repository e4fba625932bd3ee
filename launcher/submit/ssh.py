"""A list of hosts over ssh: Ray on each and ``dltrain launch`` on the first, held by a process of this machine."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...core.document import Document
from ...core.errors import JobError, Problem, RunFailed
from ...core.processes import Driver
from .adapter import OVER, Adapter, JobState
from .follow import lines_of
from .handle import Handle
from .ssh_driver import Host, Plan, launch_script, node_script, ssh
from .steps import Steps, Submission

_LINE = re.compile(r"(?P<name>[^\s=]+)(?:\s+slots\s*=\s*(?P<slots>\d+))?")
_STOPPED = (130, 143)


class Ssh(Adapter):
    """Hosts that share the working directory with this machine."""

    kind = "ssh"
    ends_with_submitter = True

    def __init__(self, hosts: tuple[Host, ...]) -> None:
        self.hosts = hosts

    @classmethod
    def read(cls, path: Path, document: Document) -> Ssh:
        """The hosts of a DeepSpeed hostfile.

        Raises:
            JobError: with every line that is none of a host.
        """
        hosts: list[Host] = []
        problems: list[Problem] = []
        for number, text in enumerate(str(document.value).splitlines(), start=1):
            words = text.partition("#")[0].strip()
            match = _LINE.fullmatch(words)
            if match is None or match["name"].startswith("-"):
                if words:
                    problems.append(Problem(f"'{words}' is no host", f"{path}:{number}", "write: host slots=8"))
            elif match["name"] in [host.name for host in hosts]:
                problems.append(Problem(f"'{match['name']}' stands here twice", f"{path}:{number}"))
            else:
                hosts.append(Host(match["name"], int(match["slots"]) if match["slots"] else None))
        if not hosts and not problems:
            problems.append(Problem("there are no hosts in it", str(path), "write: host slots=8"))
        if problems:
            raise JobError(*problems)
        return cls(tuple(hosts))

    def check(self) -> list[str]:
        """The hosts; none of them is asked."""
        return [
            f"{len(self.hosts)} hosts over ssh",
            *(f"{host.name}, {host.slots or 'any number of'} ranks" for host in self.hosts),
        ]

    def _plan(self, submission: Submission, number: str) -> Plan:
        nodes = submission.machines
        if nodes > len(self.hosts):
            what = f"the job wants {nodes} nodes, the hostfile has {len(self.hosts)}"
            raise JobError(Problem(what, "--nodes", "add hosts, or ask for fewer"))
        ranks = submission.resources.nproc_per_node
        known = [(host.slots, host.name) for host in self.hosts[:nodes] if host.slots is not None]
        slots, fewest = min(known, default=(0, ""))
        if isinstance(ranks, int) and known and slots < ranks:
            what = f"the job wants {ranks} ranks a node, {fewest} has {slots} slots"
            raise JobError(Problem(what, "--nproc-per-node", "correct the hostfile, or ask for fewer"))
        launch = ["dltrain", "launch", *submission.options, f"--run-dir={submission.runs}"]
        if ranks == "auto" and known:
            launch.append(f"--nproc-per-node={slots}")
        return Plan(
            hosts=self.hosts[:nodes],
            path=str(Path(sys.executable).parent),
            folder=str(submission.folder),
            launch=(*launch, f"--submission={self.kind}-{number}"),
            target=submission.words,
            log=str(submission.runs / submission.name / f"{self.kind}-{number}"),
            cpus_per_rank=submission.resources.cpus_per_rank or 1,
        )

    def render(self, submission: Submission) -> Steps:
        """The connections, and what is told to the hosts on them.

        Raises:
            JobError: there are not enough hosts or slots.
        """
        plan = self._plan(submission, "ID")
        first, address = plan.hosts[0].name, f"ADDRESS-OF-{plan.hosts[0].name}"
        files = {f"(standard input of ssh {host.name})": node_script(plan, host, address, 0) for host in plan.hosts}
        files[f"(standard input of another ssh {first})"] = launch_script(plan, address, 0)
        travelling = plan.variables(submission.environ)
        return Steps(
            commands=tuple(shlex.join(ssh(host.name)) for host in (*plan.hosts, plan.hosts[0])),
            files=files,
            notes=(
                "port 0 stands for one that is drawn, and a token for Ray is: it travels with the variables",
                f"nothing is copied: the hosts share {submission.folder} and {submission.runs}",
            ),
            environment=("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", *travelling),
        )

    def hand_over(self, submission: Submission, say: Callable[[str], None]) -> Handle:
        """Start the process that holds the connections.

        Raises:
            JobError: there are not enough hosts or slots.
            RunFailed: there is no ssh, or the process ended at once.
        """
        if shutil.which("ssh") is None:
            raise RunFailed("there is no ssh here")
        number = secrets.token_hex(3)
        plan = self._plan(submission, number)
        log = Path(f"{plan.log}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dltrain.launcher.submit.ssh_driver"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # the terminal's signals are not its own
            )
        driver = Driver.of(process.pid)
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(plan.to_json()).encode())
            process.stdin.close()
        except BrokenPipeError:
            raise RunFailed(f"the process that was to hold the connections ended at once: see {log}") from None
        return submission.handle(self.kind, number, {"driver": asdict(driver)})

    def jobs(self) -> list[tuple[Handle, JobState]]:
        """Hosts know of no jobs.

        Raises:
            JobError: always.
        """
        what = "hosts over ssh keep no list of jobs: each is known in the runs folder that it was submitted from"
        raise JobError(Problem(what, "--cluster", "look there with --run-dir"))

    @staticmethod
    def state(handle: Handle) -> JobState:
        """How the job stands: by its driver where that can be seen, else by what it has left."""
        driver = _driver(handle)
        try:
            code = int(Path(f"{_base(handle)}.exit").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if driver.gone:
                return JobState("failed", f"its driver, process {driver.process.pid}, is gone without a word")
            return JobState("running", f"driven by process {driver.process.pid} on {driver.host}")
        if code in _STOPPED:
            return JobState("stopped", f"exit code {code}")
        return JobState("failed" if code else "finished", f"exit code {code}")

    @staticmethod
    def output(handle: Handle, *, follow: bool) -> Iterator[bytes]:
        """What the launch has printed."""
        over = (lambda: Ssh.state(handle).standing in OVER) if follow else None
        return lines_of(Path(f"{_base(handle)}.log"), until=over)

    @staticmethod
    def stop(handle: Handle, *, now: bool) -> None:
        """Signal the driver, which passes it on.

        Raises:
            RunFailed: it is on another machine.
        """
        driver = _driver(handle)
        if not driver.is_here:
            raise RunFailed(f"{handle.name}/{handle.key} is driven from {driver.host}: stop it there")
        driver.process.signal(signal.SIGTERM if now else signal.SIGINT)


def _driver(handle: Handle) -> Driver:
    fields: dict[str, Any] = handle.cluster["driver"]
    return Driver.from_json(fields)


def _base(handle: Handle) -> str:
    return str(Path(handle.runs) / handle.name / handle.key)
