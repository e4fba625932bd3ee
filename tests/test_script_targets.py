"""Whatever ``torchrun`` can be pointed at, a forked rank runs as ``python -u`` does: output, traceback and exit."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dltrain.core.pulse import Pulse
from dltrain.launcher.host import ForkServer
from dltrain.launcher.messages import ChildSpec, TargetKind

SHOW = """\
import sys, os, json
main = sys.modules["__main__"]
print(json.dumps([__name__, __package__, __file__, __doc__, repr(__spec__), type(__loader__).__name__, repr(main),
                  sorted(globals()), sys.argv, sys.orig_argv[1:], sys.path[:2], os.getcwd()], indent=1))
"""

ENVIRONMENT = """\
import sys, time
print(sys.path, sys.warnoptions, time.tzname, ascii(sys.stdout.encoding), sys.stdout.errors)
print("\\xe4")
"""

DDP = """\
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

def main():
    distributed.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(20, 20))
    for _ in range(30):
        loss = model(torch.randn(8, 20)).sum()
        loss.backward()
        distributed.all_reduce(loss.detach())
    distributed.destroy_process_group()

main()
"""

FILES = {
    "show.py": f'"""A script that shows itself."""\n{SHOW}',
    "folder/ddp.py": DDP,
    "folder/show.py": SHOW + "import beside\n",
    "folder/beside.py": "print('imported', __name__)\n",
    "app/__main__.py": SHOW + "import helper\n",
    "app/helper.py": "print('imported', __name__)\n",
    "pkg/__init__.py": "print('package imported', __name__, sys.argv)\n".join(["import sys\n", ""]),
    "pkg/__main__.py": SHOW + "from . import mod\n",
    "pkg/mod.py": SHOW + "from . import other\n",
    "pkg/other.py": "def fail():\n    raise ValueError('from a module')\n",
    "pkg/failing.py": "from .other import fail\nfail()\n",
    "latin.py": b"# coding: latin-1\nprint(ascii('\xe4'))\n",
    "bom.py": b"\xef\xbb\xbfprint('a byte order mark')\n",
    "annotated.py": "def f(x: int, y: 'str') -> None: ...\nprint(f.__annotations__)\n",
    "syntax.py": "print('never')\nx = = 1\n",
    "missing.py": "import no_such_module\n",
    "chained.py": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise OSError(2, 'x') from e\n",
    "group.py": "raise ExceptionGroup('several', [ValueError('one'), KeyError('two')])\n",
    "nothing.py": "import sys; sys.exit()\n",
    "three.py": "import sys; sys.exit(3)\n",
    "big.py": "import sys; sys.exit(259)\n",
    "minus.py": "import sys; sys.exit(-1)\n",
    "text.py": "import atexit, sys\natexit.register(print, 'atexit')\nprint('before')\nsys.exit('a text')\n",
    "own_exit.py": "raise SystemExit(5)\n",
    "seven.py": "import os; os._exit(7)\n",
    "abort.py": "import os; os.abort()\n",
    "segfault.py": "import ctypes; ctypes.string_at(0)\n",
    "killed.py": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n",
    "interrupt.py": "import atexit\natexit.register(print, 'atexit')\nraise KeyboardInterrupt\n",
    "interrupted.py": "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n",
    "hook.py": "import sys\nsys.excepthook = lambda *e: print('hooked', e[0].__name__)\nraise ValueError\n",
    "thread.py": "import threading\nthreading.Thread(target=lambda: 1 / 0, name='t').start()\n",
    "late.py": "import atexit\n@atexit.register\ndef late():\n    raise ValueError('in atexit')\n",
    "destructor.py": "class A:\n    def __del__(self): print('destroyed')\na = A()\n",
    "replaced.py": "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint('kept')\n",
    "c.py": "import ctypes; ctypes.CDLL(None).printf(b'printed by C')\n",
    "warn.py": "import warnings; warnings.warn('careful', DeprecationWarning)\n",
    "env.py": ENVIRONMENT,
    "log.py": "import logging; logging.warning('no handlers')\n",
}


class Ending(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with zipfile.ZipFile(folder / "app.zip", "w") as archive:
        archive.writestr("__main__.py", SHOW.replace(", repr(main)", ""))
    (folder / "link.py").symlink_to("folder/show.py")
    return folder


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[ForkServer, ForkServer]]:
    """Two connections to one fork server: each is for one thread."""
    name = f"dltrain-test-{secrets.token_hex(8)}"
    with contextlib.closing(connect(name)) as one, contextlib.closing(connect(name)) as other:
        yield one, other


@pytest.fixture(scope="module")
def server(servers: tuple[ForkServer, ForkServer]) -> ForkServer:
    return servers[0]


def connect(name: str, **environ: str) -> ForkServer:
    client = ForkServer.start(name, os.environ | environ, timeout=60)
    client.hello(keep_warm=0, timeout=60)
    return client


def without_addresses(text: bytes) -> str:
    return re.sub("0x[0-9a-f]{6,}", "0x…", text.decode("latin-1"))


def run_python(programs: Path, arguments: list[str], **environ: str) -> Ending:
    command = [sys.executable, "-u", *arguments]
    done = subprocess.run(
        command, cwd=programs, env=os.environ | environ, stdin=subprocess.DEVNULL, capture_output=True
    )
    return Ending(done.returncode, *map(without_addresses, (done.stdout, done.stderr)))


def run_rank(
    server: ForkServer, programs: Path, arguments: list[str], *, fresh: bool = False, **environ: str
) -> Ending:
    """The same arguments of ``python -u`` in a forked rank, or in a fresh interpreter as ``--start-method spawn``."""
    kind: TargetKind = "module" if arguments[0] == "-m" else "file"
    name, *args = arguments[1:] if kind == "module" else arguments
    body: dict[str, Any] = {"target": {"kind": kind, "name": name, "args": args}, "run_dir": str(programs)}
    spec = ChildSpec("script", "test", os.environ | environ, str(programs), fresh=fresh, body=body)
    out, err = (os.memfd_create(name) for name in ("stdout", "stderr"))
    ours, theirs = socket.socketpair()
    pulse = Pulse.create()
    with ours, theirs, contextlib.closing(pulse):
        fds = {"stdout": out, "stderr": err, "channel": theirs.fileno(), "pulse": pulse.fd}
        child = server.fork(spec, fds)
        while not (ends := [e.exit for e in server.events(120) if e.id == child and e.exit]):
            pass
    texts = []
    for fd in (out, err):
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            texts.append(without_addresses(file.read()))
    code = ends[0].code if ends[0].code is not None else -(ends[0].signal or 0)
    return Ending(code, *texts)


TARGETS = [
    *([name] for name in FILES if "/" not in name),
    ["show.py", "--lr", "0.1", "-x", "--", "a b"],
    ["./show.py"],
    ["folder/show.py", "1"],
    ["link.py"],
    ["app"],
    ["app/", "1"],
    ["app.zip", "1"],
    ["-m", "show", "1"],
    ["-m", "pkg", "1"],
    ["-m", "pkg.mod", "--lr", "0.1"],
    ["-m", "pkg.failing"],
    ["-m", "folder.nowhere"],
    ["-m", "nowhere"],
    ["-m", "json.tool", "no-such-file"],
]


@pytest.mark.parametrize("arguments", TARGETS, ids=" ".join)
def test_a_fork_runs_it_as_python_does(server: ForkServer, programs: Path, arguments: list[str]) -> None:
    ours, theirs = run_rank(server, programs, arguments), run_python(programs, arguments)
    assert ours == theirs


@pytest.mark.parametrize(
    "arguments", [["show.py", "1"], ["-m", "pkg.mod", "1"], ["app"], ["text.py"], ["chained.py"]], ids=" ".join
)
def test_a_fresh_interpreter_runs_it_as_python_does(server: ForkServer, programs: Path, arguments: list[str]) -> None:
    assert run_rank(server, programs, arguments, fresh=True) == run_python(programs, arguments)


def test_the_environment_acts_as_on_a_new_process(programs: Path) -> None:
    environ = {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": "/opt/some/where",
        "PYTHONIOENCODING": "latin-1:replace",
        "PYTHONWARNINGS": "error::DeprecationWarning",
        "TZ": "Asia/Tokyo",
    }
    with contextlib.closing(connect(f"dltrain-test-{secrets.token_hex(8)}", **environ)) as server:
        ours, theirs = (
            run(["env.py"], **environ) for run in (partial(run_rank, server, programs), partial(run_python, programs))
        )
    assert ours == theirs
    assert "JST" in theirs.stdout


def test_a_model_may_outlive_its_process_group(servers: tuple[ForkServer, ForkServer], programs: Path) -> None:
    """Half of the forks would hang, in torch: see ``keep_process_groups``."""
    for _ in range(8):
        with socket.socket() as held, ThreadPoolExecutor(2) as threads:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does: nobody else gets the port
            held.bind(("127.0.0.1", 0))
            port = str(held.getsockname()[1])
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
            ranks = [
                threads.submit(run_rank, servers[r], programs, ["folder/ddp.py"], **place, RANK=str(r)) for r in (0, 1)
            ]
            assert [rank.result(120).code for rank in ranks] == [0, 0]
