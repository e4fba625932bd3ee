"""Run the real ``dltrain`` command in a process of its own, and look at what it leaves behind."""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent


def wait_for(condition: Callable[[], object], *, what: str, timeout: float = 120.0) -> object:
    """Poll until ``condition()`` is true and return its value; fail the test by name after ``timeout`` seconds."""
    deadline, late = time.monotonic() + timeout, False
    while not (value := condition()):
        if late:
            raise AssertionError(f"waited {timeout:g} s for {what}")
        time.sleep(0.05)
        late = time.monotonic() > deadline  # it is looked at once more: the machine may have stood still
    return value


def said(process: subprocess.Popen[str], text: str, *, timeout: float = 120.0) -> str:
    """Wait until ``process`` has printed ``text``; all that it has printed, which ``communicate`` then leaves out."""
    assert process.stdout is not None
    out, deadline = b"", time.monotonic() + timeout
    while text.encode() not in out or not out.endswith(b"\n"):  # what is left out then does not begin within a letter
        ready, _, _ = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))
        more = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
        if not more:
            raise AssertionError(f"{text!r} was not said within {timeout:g} s, but: {out.decode(errors='replace')}")
        out += more
    return out.decode()


@dataclass
class Sandbox:
    """A working directory, a temporary directory, and a mark in the environment by which all descendants are found."""

    folder: Path
    temporary: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="dl", dir="/tmp")))
    mark: str = field(default_factory=lambda: f"DLTEST_MARK={secrets.token_hex(8)}")
    prefix: tuple[str, ...] = ()
    """Put before every command."""

    @property
    def environ(self) -> dict[str, str]:
        """The environment of every command: no user's settings, no trackers, a private temporary directory."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DLTRAIN_", "WANDB_", "RAY_", "TORCHELASTIC"))}
        name, _, value = self.mark.partition("=")
        return kept | {
            name: value,
            "TMPDIR": str(self.temporary),
            "WANDB_ERROR_REPORTING": "false",
            "HOME": str(self.folder),
        }

    def run(
        self, *args: str, timeout: float = 240, command: str = "dltrain", **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ``dltrain`` (or another console script) to its end."""
        with self.start(*args, command=command, **environ) as process:
            out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @contextmanager
    def start(self, *args: str, command: str = "dltrain", **environ: str) -> Iterator[subprocess.Popen[str]]:
        """Start the command as the leader of a process group of its own; it is killed on the way out."""
        process = subprocess.Popen(
            [*self.prefix, str(BIN / command), *args],
            cwd=self.folder,
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()

    def processes(self) -> dict[int, str]:
        """Living processes that carry the mark: process id to command line."""
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    if self.mark.encode() in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
        return found

    def named(self, name: str) -> list[int]:
        """Process ids of marked processes by the name that ``ps`` shows (a rank's is ``dltrain-rank3``)."""

        def comm(pid: int) -> str:
            try:
                return Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                return ""

        return [pid for pid in self.processes() if comm(pid) == name]

    def leftovers(self, timeout: float = 60.0) -> list[str]:
        """What is still there: processes, temporary files, shared memory; processes get ``timeout`` seconds to go."""
        deadline = time.monotonic() + timeout
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        # torch makes its compile cache on import, under torchrun too; it is shared by every program of the user
        files = [str(path) for path in self.temporary.iterdir() if not path.name.startswith("torchinductor_")]
        return [*self.processes().values(), *files]

    def close(self) -> None:
        """End what is left. Processes may end by themselves meanwhile, or start others before they are killed."""

        def ended() -> bool:
            for pid in (left := self.processes()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        try:
            wait_for(ended, what="the end of killed processes")
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)
