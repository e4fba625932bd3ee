"""Weights & Biases, fed from the journal so that every step arrives exactly once and training never waits for it.

A thread starts the process of :mod:`.wandb_feed` when the first new row is there, starts it again with growing pauses
when it ends in trouble, and kills it with everything below it at the end of ``finish``'s time. Nothing of wandb is
loaded into this process, and Ctrl-C at the terminal does not reach the other: it has a session of its own.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..core.job import WandbSpec
from ..core.wire import Channel
from .alerts import alerts
from .outcome import Outcome
from .processes import kill_descendants
from .wandb_feed import FeedRequest
from .wandb_mode import Mode, api_key_present, resolve_mode

__all__ = ["Outcome", "WandbPump", "api_key_present", "resolve_mode"]

_FIRST_ROW_POLL = 0.5
_LONGEST_PAUSE = 60.0
_LONGEST_PAUSE_AT_END = 2.0
_STALL_GRACE = 30.0
_GLANCE = 0.1  # seconds between looks at whether to give up


class WandbPump:
    """Feeds one W&B run from the journal, from construction until :meth:`finish`.

    Neither method raises or waits for a server. Trouble is told through ``on_message``, once per kind of it and from a
    thread of the pump.

    Args:
        journal: the run's metrics file. It need not be there yet.
        run_dir: everything that wandb writes goes into its folder ``wandb``.
        spec: the job's settings.
        run_id: W&B's id of the run; the same for every attempt at it, and of nothing else.
        name: display name where ``spec`` has none.
        config: what W&B shows as the run's config. Secrets are the caller's to leave out.
        on_message: told of trouble, in words for the user.
        server_timeout: seconds that W&B may take to start a run, and to finish one.
        upload_interval: whole seconds between uploads.
        pause: seconds before the first new try after trouble; each further one waits twice as long, up to a minute.

    Raises:
        JobError: ``spec`` asks for online, and there is no API key.
    """

    def __init__(
        self,
        journal: str | Path,
        run_dir: str | Path,
        spec: WandbSpec,
        *,
        run_id: str,
        name: str,
        config: Mapping[str, Any],
        on_message: Callable[[str], None],
        server_timeout: float = 30.0,
        upload_interval: int = 5,
        pause: float = 2.0,
    ) -> None:
        self.mode: Mode = resolve_mode(spec.mode, api_key_present(), env_mode=os.environ.get("WANDB_MODE", ""))
        self.url = ""
        self._journal = Path(journal).absolute()
        self._size_at_start = self._journal_size()
        self._on_message = on_message
        self._pause = pause
        self._stall_limit = 2 * server_timeout + _STALL_GRACE
        self._said: set[str] = set()
        self._rows = 0
        self._trouble = ""
        self._deadline = math.inf
        self._exit_code = 0
        self._outcome = Outcome("disabled")
        if self.mode == "disabled":
            return
        self._request = FeedRequest(
            journal=str(self._journal),
            run_dir=str(Path(run_dir).absolute()),
            mode=self.mode,
            run_id=run_id,
            project=spec.project,
            entity=spec.entity,
            name=spec.name or name,
            tags=list(spec.tags),
            config=dict(config),
            server_timeout=server_timeout,
            upload_interval=upload_interval,
        )
        self._wake_here, self._wake_there = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="wandb-pump", daemon=True)
        self._thread.start()

    def finish(self, timeout: float, *, failed: bool = False, give_up: Callable[[], bool] = lambda: False) -> Outcome:
        """Send the rest of what the journal's file holds, and see that it has arrived.

        Args:
            timeout: seconds after which what was started is killed; returning takes two more at most.
            failed: mark the run as failed in W&B.
            give_up: asked several times a second; true ends the wait as if the time were over.
        """
        if self.mode == "disabled" or self._deadline < math.inf:
            return self._outcome
        self._exit_code = int(failed)
        self._deadline = time.monotonic() + timeout
        with self._wake_there:
            self._wake_there.send(b"\n")
            while self._thread.is_alive() and time.monotonic() < self._deadline + 2.0:
                self._thread.join(_GLANCE)
                if give_up():
                    self._deadline = min(self._deadline, time.monotonic())
        return self._outcome

    @property
    def _finishing(self) -> bool:
        return self._deadline < math.inf

    def _run(self) -> None:
        self._outcome = self._incomplete()
        try:
            with self._wake_here:
                self._outcome = self._pump()
        except Exception as error:  # a tracker is never the reason that a run fails
            self._say(type(error).__name__, str(error))
            self._outcome = self._incomplete()

    def _pump(self) -> Outcome:
        while self._journal_size() == self._size_at_start and not self._finishing:
            self._wait_for_finish(_FIRST_ROW_POLL)
        if self._journal_size() == 0 and not alerts(self._journal.parent):
            return Outcome("complete", message="W&B: nothing was logged, so no run was made")
        pause = self._pause
        while time.monotonic() < self._deadline:
            started_at = time.monotonic()
            done = self._attempt()
            if done is not None:
                return self._complete(done)
            if time.monotonic() - started_at > _LONGEST_PAUSE:
                pause = self._pause
            self._wait_for_finish(min(pause, _LONGEST_PAUSE_AT_END) if self._finishing else pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return self._incomplete()

    def _attempt(self) -> dict[str, Any] | None:
        try:
            feed = _FeedProcess(self._request)
        except OSError as error:
            self._say(type(error).__name__, str(error))
            return None
        try:
            return self._follow(feed)
        finally:
            feed.kill()

    def _follow(self, feed: _FeedProcess) -> dict[str, Any] | None:
        """Listen to a feed until it ends: what it says it has done, or None."""
        heard_at = time.monotonic()
        told_to_finish = in_trouble = False
        while True:
            if self._finishing and not told_to_finish:
                feed.channel.send({"exit_code": self._exit_code})
                told_to_finish = True
            now = time.monotonic()
            if now >= self._deadline:
                return None
            if now - heard_at > self._stall_limit:
                self._say("stalled", f"its process has not answered for {now - heard_at:.0f} s and is started again")
                return None
            fd = feed.channel.fileno()
            waiting = [fd] if told_to_finish else [fd, self._wake_here.fileno()]
            latest = now + _GLANCE if told_to_finish else heard_at + self._stall_limit
            if fd not in wait(waiting, min(self._deadline, latest) - now):
                continue
            heard_at = time.monotonic()
            for message in feed.channel.receive():
                match message["kind"]:
                    case "run":
                        self.url = message["url"]
                    case "rows":
                        self._rows = message["rows"]
                    case "trouble":
                        in_trouble = True
                        self._say(message["type"], message["text"])
                    case "done":
                        return message
                    case kind:
                        raise AssertionError(f"a feed says {kind}")
            if feed.channel.closed:
                if not in_trouble:
                    self._say(
                        "process ended", f"with status {feed.wait()}; {self._request.folder / 'feed.log'} may say why"
                    )
                return None

    def _journal_size(self) -> int:
        try:
            return self._journal.stat().st_size
        except OSError:
            return 0

    def _wait_for_finish(self, seconds: float) -> None:
        if not self._finishing:
            wait([self._wake_here], seconds)
            return
        until = time.monotonic() + seconds
        while (left := min(until, self._deadline) - time.monotonic()) > 0:
            time.sleep(min(left, _GLANCE))

    def _say(self, kind: str, text: str) -> None:
        self._trouble = f"{kind}: {text}" if text else kind
        if kind not in self._said:
            self._said.add(kind)
            self._on_message(f"W&B: {self._trouble.rstrip('.')}. Training goes on; the metrics are in {self._journal}")

    def _complete(self, done: Mapping[str, Any]) -> Outcome:
        if self.mode == "online":
            return Outcome("complete", done["rows"], done["url"], "", f"W&B: {done['rows']} rows at {done['url']}")
        command = f"wandb sync {shlex.quote(done['folder'])}"
        message = f"W&B: {done['rows']} rows kept offline; to send them: {command}"
        return Outcome("offline", done["rows"], "", command, message)

    def _incomplete(self) -> Outcome:
        request = self._request.folder / "feed.json"
        command = shlex.join([sys.executable, "-m", f"{__package__}.wandb_feed", str(request)])
        why = self._trouble or "the time to finish was too short"
        message = f"W&B: not all rows were sent ({why}); to send them: {command}"
        return Outcome("incomplete", self._rows, self.url, command, message)


class _FeedProcess:
    """The process of :mod:`.wandb_feed`, and the channel to it."""

    def __init__(self, request: FeedRequest) -> None:
        path = request.write()
        with ExitStack() as undo:
            # Short, as wandb-core makes its socket there: a socket's path has 107 bytes at most.
            self._scratch = tempfile.mkdtemp(prefix="dltrain-wandb-")
            undo.callback(shutil.rmtree, self._scratch, ignore_errors=True)
            here, there = socket.socketpair()
            undo.callback(here.close)
            command = [sys.executable, "-P", "-m", f"{__package__}.wandb_feed", str(path)]
            command += ["--control", str(there.fileno()), "--scratch", self._scratch]
            with there, (request.folder / "feed.log").open("ab") as log:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    pass_fds=[there.fileno()],
                    start_new_session=True,
                )
            undo.pop_all()
        self.channel = Channel(here)

    def kill(self) -> None:
        """End it, and wandb-core with it, in whatever state they are."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)
            kill_descendants(self.process.pid)
            self.process.kill()
            self.wait()
        self.channel.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def wait(self) -> int | None:
        """Its exit status, once it has ended; None when that takes a second."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        return self.process.returncode
