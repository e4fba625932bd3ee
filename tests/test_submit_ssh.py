"""Jobs submitted to hosts over real ssh: to their end, and stopped by Ctrl-C; nothing of them stays."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import dltrain
from launching import Sandbox, wait_for
from runs import RunFolder
from ssh_hosts import SshHosts, ssh_hosts, why_not
from stage import JOB, assert_same_run, gate, put_recipe

SUBMIT = ("submit", "--cluster", "hostfile", "--nodes", "2", *JOB, "resources.cpus_per_rank=1")
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def hosts() -> Iterator[SshHosts]:
    if reason := why_not():
        pytest.skip(reason)
    with ssh_hosts(2) as up:
        yield up


@pytest.mark.campaign
def test_a_job_over_ssh_ends_with_the_same_weights_and_ctrl_c_ends_it_all(
    sandbox: Sandbox, hosts: SshHosts, reference: RunFolder
) -> None:
    sandbox.prefix = hosts.machines[0].prefix
    put_recipe(sandbox)
    (sandbox.folder / "hostfile").write_text("m0 slots=1\nm1 slots=1\n", encoding="utf-8")
    environ = hosts.environ | {"WANDB_API_KEY": SECRET}
    (sandbox.folder / "until-told").touch()
    closed = gate(sandbox)
    with sandbox.start(*SUBMIT, "-f", **environ) as process:
        waiting = [sandbox.folder / f"waiting-{rank}" for rank in range(2)]
        wait_for(lambda: all(path.exists() for path in waiting), what="ranks at the gate", timeout=120)
        assert [line for line in hosts.processes() if "raylet" in line]
        assert not [line for line in hosts.processes() if SECRET in line]
        os.killpg(process.pid, signal.SIGINT)
        closed.unlink()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    job = out.partition("digits/ssh-")[2].split()[0]
    stopped = sandbox.run("status", f"digits/ssh-{job}", **environ)
    assert stopped.returncode == 3, stopped.stdout + stopped.stderr
    assert f"ssh {job}, stopped (exit code 143)" in stopped.stdout
    wait_for(lambda: not hosts.processes(), what="the end of all on the hosts")

    done = sandbox.run(*SUBMIT, "--wait", **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunFolder(sandbox.folder / "runs/digits/0001")
    assert_same_run(run, reference)
    wait_for(lambda: not hosts.processes(), what="the end of all on the hosts")
    written = "".join(p.read_text(errors="replace") for p in sandbox.folder.rglob("*.*") if p.is_file())
    assert SECRET not in written
    listed = sandbox.run("runs", **environ)
    assert [line.split()[:3] for line in listed.stdout.splitlines()[1:]] == [["digits/0001", "finished", "60"]]


SSH = """\
#!/bin/bash
# stands for ssh: a shell of this machine, on which Ray never comes up
[[ $1 != -G ]] || { echo "hostname 127.0.0.1"; exit; }
ray() { sleep 600; }
export -f ray
exec bash -s
"""


def test_a_job_whose_machines_have_not_come_up_is_stopped_at_once(sandbox: Sandbox) -> None:
    ssh = sandbox.folder / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH, encoding="utf-8")
    ssh.chmod(0o755)
    (sandbox.folder / "hostfile").write_text("m0 slots=1\n", encoding="utf-8")
    environ = {"PATH": f"{ssh.parent}:{os.environ['PATH']}"}
    submitted = sandbox.run("submit", "--cluster", "hostfile", **environ)
    assert submitted.returncode == 0, submitted.stderr
    wait_for(lambda: any("submit.gather" in line for line in sandbox.processes().values()), what="the wait for Ray")
    stopped = sandbox.run("stop", **environ)
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped (exit code 143)" in stopped.stdout


def test_a_hostfile_that_cannot_be_right_is_refused_by_line(empty_folder: Path) -> None:
    Path("hostfile").write_text("# two\na slots=4\nb slots four\na\n-oProxyCommand=x\n", encoding="utf-8")
    refused = dltrain("cluster", "check", "hostfile")
    assert refused.code == 2
    for says in ("hostfile:3: 'b slots four' is no host", "hostfile:4: 'a' stands here twice", "hostfile:5: '-oProxy"):
        assert says in refused.err
