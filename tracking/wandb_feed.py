"""The process that owns a run's W&B side: it feeds wandb from the journal and asks the server at the end.

A killed or offline run can be sent by hand, each step once, as often as it takes::

    python -m dltrain.tracking.wandb_feed RUN_DIR/wandb/feed.json

Any trouble ends this process; whoever started it starts it again. That loses and doubles nothing: the journal has
every row, the server knows the last step it has (``run.starting_step``), and one process at a time feeds a run. It is a
process and not a thread because wandb may hang in any call, and because its global state (``wandb.teardown``, the
environment, ``sys.excepthook``) belongs to the user's own program, such as a notebook with runs of its own.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from ..core.wire import Channel, Message
from .alerts import Sent, alerts
from .files import write_whole
from .journal import Tail
from .processes import kill_descendants, run_in_gaps

if TYPE_CHECKING:
    from wandb import Run

SUMMARY = "summary.json"
_POLL_SECONDS = 1.0
_PULSE_SECONDS = 5.0
_AUDITS = 1

# What would send the rows to some other run, or to some other process's wandb-core.
_NOT_INHERITED = (
    *("WANDB_DIR", "WANDB_LAUNCH", "WANDB_MODE", "WANDB_RESUME", "WANDB_RUN_DIR", "WANDB_RUN_ID", "WANDB_SERVICE"),
    *("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH"),
)


@dataclass(frozen=True)
class FeedRequest:
    """What to feed where, as the file beside the W&B folder says it. It holds no key.

    Attributes:
        server_timeout: seconds that wandb may take to start a run, and to finish one.
        upload_interval: whole seconds between uploads.
    """

    journal: str
    run_dir: str
    mode: Literal["online", "offline"]
    run_id: str
    project: str
    entity: str | None
    name: str
    tags: list[str]
    config: dict[str, Any]
    server_timeout: float
    upload_interval: int

    @property
    def folder(self) -> Path:
        return Path(self.run_dir, "wandb")

    def write(self) -> Path:
        """Put the request into the W&B folder; the file's path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "feed.json"
        write_whole(path, json.dumps(asdict(self), indent=1, default=str))
        return path

    @classmethod
    def read(cls, path: Path) -> FeedRequest:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Link:
    """To the process that started this one: tells it how it goes, and hears when the rows have come to an end."""

    def __init__(self, channel: Channel | None) -> None:
        self._channel = channel
        self.finishing = channel is None
        self.exit_code = 0

    def tell(self, kind: str, **message: Any) -> None:
        if self._channel is None:
            print(kind, *(f"{name}={value}" for name, value in message.items() if value), flush=True)  # noqa: T201  # by hand
        else:
            self._channel.send({"kind": kind, **message})

    def wait(self, seconds: float) -> None:
        """Until the rows have come to an end, at most ``seconds``."""
        if self._channel is None or self.finishing:
            time.sleep(seconds)
        elif select.select([self._channel], [], [], seconds)[0]:
            for message in self._channel.receive():
                self.finishing, self.exit_code = True, message["exit_code"]

    def flush(self) -> None:
        if self._channel is not None:
            self._channel.flush(5.0)


class Feed:
    """Feeds one run, from whatever step the server has to the end of the journal."""

    def __init__(self, request: FeedRequest, link: Link) -> None:
        self._request = request
        self._link = link
        self._stop_asked = threading.Event()
        self._heed_stop = True
        self._rows = 0
        self._last_step = -1
        self._told_at = time.monotonic()

    def run(self) -> Message:
        """Feed until the link says that the rows have come to an end, and everything is where it belongs.

        Raises:
            Exception: whatever wandb raises.
        """
        attempt = -1
        while True:
            attempt += 1
            run = self._start()
            missing = run.starting_step <= self._last_step
            if missing and (self._stop_asked.is_set() or attempt > _AUDITS):
                raise ConnectionError(f"the server has the steps below {run.starting_step} of {self._last_step + 1}")
            if self._stop_asked.is_set():
                # Everything has arrived, so it was no fatal error: somebody pressed "Stop run" in the browser.
                self._heed_stop = False
                self._link.tell("trouble", type="Stopped", text="'Stop run' does not reach the ranks, Ctrl-C does")
            self._stop_asked.clear()
            if attempt and self._link.finishing and not missing:
                break
            self._feed(run)
            if self._link.finishing:
                self._summarize(run)
            if self._request.mode == "offline":
                break
            # finish() succeeds silently where the server refused the rows: start again, to be told what it has.
            run.finish(exit_code=self._link.exit_code)
            self._link.wait(min(attempt, 5))
        folder = str(Path(run.dir).parent)
        run.finish(exit_code=self._link.exit_code)
        return {"rows": self._rows, "url": run.url or "", "folder": folder}

    def _start(self) -> Run:
        import wandb

        request = self._request
        settings = {
            "silent": True,
            "quiet": True,
            "console": "off",
            "init_timeout": request.server_timeout,
            "finish_timeout": request.server_timeout,
            "finish_timeout_raises": True,
            "stop_on_fatal_error": True,
            "stop_fn": self._stop_asked.set,
            # This process is not the training: what wandb would find out about it is slow to find and misleading.
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "label_disable": True,
            "x_disable_meta": True,
            "x_disable_machine_info": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
            "x_file_stream_transmit_interval": request.upload_interval,
            "x_transaction_log_flush_interval": 1.0,
            "symlink": False,
        }
        self._remove_older_folders()
        run = wandb.init(
            id=request.run_id,
            project=request.project,
            entity=request.entity,
            name=request.name,
            tags=request.tags or None,
            config=request.config,
            dir=request.run_dir,
            mode=request.mode,
            # An offline folder has every row, so syncing it writes the run from its first line on, however often.
            resume="allow" if request.mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(**{k: v for k, v in settings.items() if k in wandb.Settings.model_fields}),
        )
        if run.id != request.run_id:
            raise RuntimeError(f"wandb started the run {run.id} in place of {request.run_id}")
        self._link.tell("run", url=run.url or "")
        if not self._link.finishing:
            run_in_gaps()
        return run

    def _remove_older_folders(self) -> None:
        """Each start writes a folder of its own; two together would hold steps twice. The journal has them all."""
        for folder in self._request.folder.glob(f"*run-*-{glob.escape(self._request.run_id)}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _feed(self, run: Run) -> None:
        """Log the journal's rows from ``run.starting_step`` on, until they have come to an end or uploading has."""
        tail = Tail(self._request.journal)
        # An offline folder is written anew from the first row on: the alerts of one before are not in it.
        sent = Sent(self._request.folder / "alerts-sent", anew=self._request.mode == "offline")
        self._rows = 0
        while not (self._stop_asked.is_set() and self._heed_stop):
            finishing = self._link.finishing
            rows = tail.read()
            self._alert(run, sent)
            for row in rows:
                if row.step >= run.starting_step:
                    run.log({**row.metrics, "_timestamp": row.time}, step=row.step, commit=True)
                self._rows += 1
                self._last_step = row.step
                self._pulse()
            if not rows:
                if finishing:
                    return
                self._link.wait(_POLL_SECONDS)
                self._pulse()

    def _alert(self, run: Run, sent: Sent) -> None:
        for alert in alerts(Path(self._request.run_dir))[sent.count :]:
            run.alert(alert.title, alert.text, level=alert.level, wait_duration=0)
            sent.add()

    def _summarize(self, run: Run) -> None:
        """Put what is known of the run as a whole beside its metrics."""
        with suppress(OSError, ValueError):
            run.summary.update(json.loads(Path(self._request.run_dir, SUMMARY).read_text(encoding="utf-8")))

    def _pulse(self) -> None:
        now = time.monotonic()
        if now - self._told_at > _PULSE_SECONDS:
            self._told_at = now
            self._link.tell("rows", rows=self._rows)


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="dltrain.tracking.wandb_feed", description="Send a run's metrics to W&B.")
    parser.add_argument("request", type=Path, help="the file feed.json in the run's wandb folder")
    parser.add_argument("--control", type=int, metavar="FD", help="socket to the process that started this one")
    parser.add_argument("--scratch", metavar="FOLDER", help="folder for temporary files, removed at the end")
    args = parser.parse_args()
    scratch = args.scratch or tempfile.mkdtemp(prefix="dltrain-wandb-")
    request = FeedRequest.read(args.request)
    channel = None
    if args.control is not None:
        # A signal to everything of the job is the controller's to act on; this process ends after it, or with it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        channel = Channel(socket.socket(fileno=args.control))
        threading.Thread(target=_end_with, args=(args.control, os.getppid(), scratch), daemon=True).start()
    os.nice(10)  # the ranks come first where the cores are few
    link = Link(channel)
    for name in _NOT_INHERITED:
        os.environ.pop(name, None)
    cache = str(request.folder / "cache")
    tempfile.tempdir = scratch
    os.environ |= {"WANDB_SILENT": "true", "WANDB_CACHE_DIR": cache, "WANDB_DATA_DIR": cache, "TMPDIR": scratch}
    try:
        with _only_one(request):
            done = Feed(request, link).run()
            _close_wandb()
        link.tell("done", **done)
        status = 0
    except Exception as error:
        text = str(error).strip().partition("\n")[0][:300]
        link.tell("trouble", type=type(error).__name__, text=text)
        status = 1
    link.flush()
    _leave(status, scratch)


def _only_one(request: FeedRequest) -> IO[str]:
    """Held while a run is fed, where the file system has locks: two at once would overwrite each other's rows."""
    file = (request.folder / "feed.lock").open("w")
    deadline = time.monotonic() + request.server_timeout
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process is feeding this run, it holds {file.name}") from None
            time.sleep(0.1)
        except OSError:
            return file
        else:
            return file


def _end_with(fd: int, parent: int, scratch: str) -> None:
    """End this process when the one that started it is gone: its successor is the run's owner."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    while not poll.poll(1000) and os.getppid() == parent:
        pass
    _leave(3, scratch)


def _close_wandb() -> None:
    import wandb

    wandb.teardown()


def _leave(status: int, scratch: str) -> None:
    """End without wandb's exit hooks, which may wait for its server for ever."""
    kill_descendants(os.getpid())
    shutil.rmtree(scratch, ignore_errors=True)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
