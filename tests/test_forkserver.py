"""The fork server: one thread, shared pages, leases that leave nothing behind, and names that keep launches apart."""

from __future__ import annotations

import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from textwrap import dedent

import pytest
from dltrain.core.pulse import Pulse
from dltrain.launcher.forkserver import TAKEN
from dltrain.launcher.host import ForkServer, HostError, last_edit, server_name
from dltrain.launcher.messages import ChildSpec, Exit
from launching import Sandbox, wait_for

TIMEOUT = 60.0


class Lease:
    """A lease on a server, and scripts run on it."""

    def __init__(self, box: Sandbox, *, name: str = "", keep_warm: float = 0.0, **environ: str) -> None:
        self.box = box
        self.environ = box.environ | environ
        self.name = name or f"dltrain-test-{secrets.token_hex(8)}"
        self.server = ForkServer.start(self.name, self.environ, TIMEOUT)
        try:
            self.facts = self.server.hello(keep_warm=keep_warm, timeout=TIMEOUT)
        except HostError:
            self.server.close()
            raise
        self.pids: dict[int, int] = {}

    @property
    def pid(self) -> int:
        return self.facts["pid"]

    def run(self, code: str) -> int:
        """Run Python code in a child; its id. What it prints goes to the file ``output`` in the sandbox's folder."""
        name = secrets.token_hex(4)
        script = self.box.folder / f"{name}.py"
        script.write_text(dedent(code), encoding="utf-8")
        return self.fork("file", str(script))

    def fork(self, kind: str, name: str, *, cwd: str = "") -> int:
        """Run a target in a child; its id."""
        body = {"target": {"kind": kind, "name": name, "args": []}, "run_dir": str(self.box.folder)}
        cwd = cwd or str(self.box.folder)
        fresh = kind == "program"
        spec = ChildSpec("script", "dltrain-test", env=self.environ, cwd=cwd, threads=1, fresh=fresh, body=body)
        with ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            stack.enter_context(theirs)
            pulse = stack.enter_context(closing(Pulse.create()))
            output = os.open(self.box.folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            stack.callback(os.close, output)
            fds = {"stdout": output, "stderr": output, "channel": theirs.fileno(), "pulse": pulse.fd}
            return self.server.fork(spec, fds)

    def exit_of(self, child: int) -> Exit:
        """Wait for a child's end."""
        return wait_for(lambda: self._take(child), what=f"the end of child {child}")  # pyright: ignore[reportReturnType]

    def _take(self, child: int) -> Exit | None:
        for event in self.server.events(0.1):
            if event.id == child and event.exit is not None:
                return event.exit
            self.pids.setdefault(event.id, event.pid)
        return None

    def output(self) -> str:
        return (self.box.folder / "output").read_text(encoding="utf-8")

    def finish(self, code: str) -> str:
        """Run code to a good end; what it printed."""
        assert self.exit_of(self.run(code)).ok, self.output()
        return self.output()

    def close(self) -> None:
        self.server.close()


@pytest.fixture
def lease(sandbox: Sandbox) -> Iterator[Lease]:
    lease = Lease(sandbox)
    yield lease
    lease.close()


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_fork_has_torch_shares_its_pages_and_holds_only_its_own_files(lease: Lease) -> None:
    assert lease.facts["threads"] == 1
    printed = lease.finish("""
        import os, sys
        print("torch loaded:", "torch" in sys.modules and "torch._dynamo" in sys.modules)
        print("cuda touched:", sys.modules["torch"].cuda.is_initialized())
        print("files:", len(os.listdir("/proc/self/fd")) - 1)
        print("leads its session:", os.getsid(0) == os.getpgid(0) == os.getpid())
        numbers = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
        pss, rss = (int(numbers[name].split()[0]) for name in ("Pss", "Rss"))
        print("shares its pages:", pss < 0.6 * rss or (pss, rss))
    """)
    assert printed.splitlines() == [
        "torch loaded: True",
        "cuda touched: False",
        "files: 6",  # standard input, output, error; the channel; the pulse, and mmap's duplicate of it
        "leads its session: True",
        "shares its pages: True",
    ]
    assert len(list(Path(f"/proc/{lease.pid}/task").iterdir())) == 1


def test_ends_are_told_as_they_were_and_take_the_process_group_along(lease: Lease) -> None:
    left = lease.exit_of(lease.run("raise SystemExit(3)"))
    assert (left.code, left.signal) == (3, None)
    assert left.max_rss > 10 << 20
    killed = lease.exit_of(lease.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert (killed.code, killed.signal) == (None, signal.SIGKILL)
    helper = lease.run("""
        import subprocess
        print(subprocess.Popen(["sleep", "100"]).pid)
    """)
    assert lease.exit_of(helper).ok
    pid = int(lease.output().split()[-1])
    wait_for(lambda: not alive(pid), what="the end of the child's own child")
    stubborn = lease.run("""
        import os, signal
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        print("ready")
        signal.pause()
    """)
    wait_for(lambda: "ready" in lease.output(), what="the child")
    lease.server.signal(stubborn, signal.SIGTERM)
    assert lease.exit_of(stubborn).code == 7
    lease.server.signal(stubborn, signal.SIGTERM)  # to one that has ended: nothing


def test_what_cannot_start_says_why(lease: Lease) -> None:
    assert lease.exit_of(lease.fork("program", "no-such-program")).code == 127
    assert lease.exit_of(lease.fork("file", "x.py", cwd="/no/such/folder")).code == 127
    assert lease.output().splitlines() == [
        "dltrain: dltrain-test cannot start: [Errno 2] No such file or directory: 'no-such-program'",
        "dltrain: dltrain-test cannot start: [Errno 2] No such file or directory: '/no/such/folder'",
    ]


def test_a_dropped_lease_takes_children_and_grandchildren_along(lease: Lease) -> None:
    lease.run("""
        import os, subprocess, time
        away = subprocess.Popen(["sleep", "100"], start_new_session=True).pid
        print(os.getpid(), away, flush=True)
        time.sleep(100)
    """)
    wait_for(lambda: lease.output().endswith("\n"), what="the child")  # which writes unbuffered, word by word
    pids = [int(word) for word in lease.output().split()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    lease.close()
    wait_for(lambda: not any(map(alive, [*pids, lease.pid])), what="the end of child, grandchild and server")


def test_a_child_that_has_hardly_begun_ends_with_its_lease(lease: Lease, sandbox: Sandbox) -> None:
    for _ in range(30):
        hasty = Lease(sandbox, name=lease.name)
        hasty.run("import time; time.sleep(100)")
        hasty.close()
    assert lease.finish("print('served')") == "served\n"
    children = Path(f"/proc/{lease.pid}/task/{lease.pid}/children")
    wait_for(lambda: not children.read_text().split(), what="the end of the children")


def test_leases_on_one_server_are_apart_and_a_second_server_defers_to_the_first(lease: Lease, sandbox: Sandbox) -> None:
    command = [sys.executable, "-P", "-m", "dltrain.launcher.forkserver", lease.name, "5"]
    second = subprocess.run(command, env=lease.environ, timeout=TIMEOUT, check=False)
    assert second.returncode == TAKEN
    other = Lease(sandbox, name=lease.name)
    assert other.pid == lease.pid
    for each in (lease, other):
        each.run("import time; time.sleep(100)")
        wait_for(lambda each=each: each._take(0) or each.pids, what="the child")
    mine, theirs = next(iter(lease.pids.values())), next(iter(other.pids.values()))
    other.close()
    wait_for(lambda: not alive(theirs), what="the end of the other lease's child")
    assert alive(mine)
    os.kill(lease.pid, signal.SIGTERM)  # to everything of a session, say: the lease decides
    assert lease.finish("print('still here')") == "still here\n"


def test_a_warm_server_stays_for_its_time(sandbox: Sandbox) -> None:
    brief = Lease(sandbox, keep_warm=0.5)
    brief.close()
    wait_for(lambda: not alive(brief.pid), what="the end of the warm time")
    first = Lease(sandbox, name=brief.name, keep_warm=600.0)  # longer than this test can take
    assert first.pid != brief.pid
    first.close()
    second = Lease(sandbox, name=first.name)
    assert second.pid == first.pid
    assert alive(first.pid)
    second.close()
    os.kill(first.pid, signal.SIGTERM)
    wait_for(lambda: not alive(first.pid), what="the end that was asked for")


def test_a_server_that_dies_is_an_error_with_its_last_words(sandbox: Sandbox) -> None:
    lease = Lease(sandbox)
    lease.run("import time; time.sleep(100)")
    wait_for(lambda: lease._take(0) or lease.pids, what="the child")
    os.kill(lease.pid, signal.SIGKILL)
    with pytest.raises(HostError, match="the fork server died"):
        lease.exit_of(1)
    wait_for(lambda: not alive(lease.pids[1]), what="the end of the child")
    lease.close()
    broken = sandbox.folder / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise RuntimeError('no torch today')", encoding="utf-8")
    with pytest.raises(HostError, match="RuntimeError: no torch today"):
        Lease(sandbox, PYTHONPATH=str(broken))


def test_a_server_that_ends_just_as_one_is_asked_for_is_replaced(sandbox: Sandbox) -> None:
    name = f"dltrain-test-{secrets.token_hex(8)}"

    def starters() -> list[int]:
        return [pid for pid, line in sandbox.processes().items() if name in line]

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ending, ThreadPoolExecutor(1) as pool:
        ending.bind("\0" + name)  # and answers nobody any more
        asked = pool.submit(Lease, sandbox, name=name, PYTHONWARNINGS="odd")  # its interpreter prints a complaint
        first = wait_for(starters, what="the start of a server")
        wait_for(lambda: set(starters()).isdisjoint(first), what="its end: the name is taken")  # pyright: ignore[reportArgumentType]
        ending.close()
        lease = asked.result(TIMEOUT)
    assert lease.finish("print('served')") == "served\n"
    lease.close()


def test_a_lease_is_given_up_once(lease: Lease) -> None:
    lease.close()
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]  # they have the numbers that were the lease's
    lease.close()
    for fd in others:
        os.close(fd)


def test_a_server_is_shared_only_where_a_fresh_process_would_be_the_same() -> None:
    base = {"HOME": "/root", "OMP_NUM_THREADS": "1"}
    name = server_name("node", base)
    assert name == server_name("node", base | {"ANYTHING": "else", "OMP_NUM_THREADS": "8"})
    for other in ({"PYTHONPATH": "/x"}, {"TORCH_LOGS": "all"}, {"LD_PRELOAD": "x.so"}, {"MKL_DEBUG_CPU_TYPE": "5"}):
        assert server_name("node", base | other) != name
    assert server_name("other node", base) != name


def test_an_edit_of_the_package_asks_for_another_server(tmp_path: Path) -> None:
    module = tmp_path / "core/job.py"
    module.parent.mkdir()
    module.touch()
    before = last_edit(tmp_path)
    os.utime(module, ns=(before, before + 1))
    assert last_edit(tmp_path) == before + 1


def test_a_server_out_of_descriptors_says_so_and_goes_on(lease: Lease) -> None:
    limits = resource.prlimit(lease.pid, resource.RLIMIT_NOFILE)
    open_now = len(list(Path(f"/proc/{lease.pid}/fd").iterdir()))
    resource.prlimit(lease.pid, resource.RLIMIT_NOFILE, (open_now + 2, limits[1]))
    child = lease.run("print('never')")
    (refused,) = wait_for(lambda: [e for e in lease.server.events(0.1) if e.id == child], what="the answer")  # pyright: ignore
    assert "no file descriptors left" in refused.what
    resource.prlimit(lease.pid, resource.RLIMIT_NOFILE, limits)
    assert lease.finish("print('again')") == "again\n"
