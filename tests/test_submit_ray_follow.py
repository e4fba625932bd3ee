"""The output of a Ray job, followed while the dashboard fails: every line once, and said."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from dltrain.cli.submit import follow as show
from dltrain.core.errors import RunFailed
from dltrain.launcher.submit import follow, ray_jobs, ray_output
from dltrain.launcher.submit.adapter import JobState
from dltrain.launcher.submit.handle import Handle
from dltrain.launcher.submit.jobs import output_of

pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # said by Ray

#: What each connection sends of the log, as far as the job has printed, and how it ends.
Connections = Sequence[tuple[list[str], str]]

FAILING: Connections = (
    (["one\ntw"], "dropped"),
    ([], "500"),
    (["one\n", "two\nthr"], "closed"),  # in good order, though the job runs: the dashboard was told to end
    (["one\ntwo\nthree\n", "fo\u00fcr\n"], "closed"),
    (["one\ntwo\nthree\nfo\u00fcr\nfive\n"], "closed"),
)
DEAD: Connections = (
    (["one\ntw"], "silent"),
    (["one\n", "two\nthr"], "silent"),
    (["one\ntwo\nthree\n"], "silent"),  # the job is known to be over, and this is not all
    (["one\ntwo\nthree\nfour\n"], "closed"),
)


class Server(ThreadingHTTPServer):
    """Of a cluster whose job 7 is over after ``running`` connections; the last one is had again and again.

    Attributes:
        faults: how questions for the version are answered after the first connection.
    """

    def __init__(self, connections: Connections, running: int, faults: Sequence[str] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Dashboard)
        self.connections, self.running, self.faults = connections, running, list(faults)
        self.tails = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Dashboard(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        if self.path == "/api/version":
            self._version(self.server.faults.pop(0) if self.server.tails and self.server.faults else "")
        elif self.path == "/api/jobs/7":
            status = "RUNNING" if self.server.tails < self.server.running else "SUCCEEDED"
            job = {"type": "SUBMISSION", "submission_id": "7", "status": status, "entrypoint": "x"}
            self._answer(200, json.dumps(job))
        else:
            pieces, end = self.server.connections[min(self.server.tails, len(self.server.connections) - 1)]
            self.server.tails += 1
            if end == "500":
                self._answer(500, "restarting")
            else:
                self._tail(pieces, end)

    def _version(self, fault: str) -> None:
        if fault == "cut":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"ff\r\n{")
            self.close_connection = True
        elif fault == "html":
            self._answer(200, "<html>be right back</html>")
        else:
            self._answer(503 if fault else 200, json.dumps({"version": "4", "ray_version": "2.60.0"}))

    def _answer(self, code: int, said: str) -> None:
        text = said.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _tail(self, pieces: list[str], end: str) -> None:
        """A WebSocket (RFC 6455) with short text frames."""
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        for data in (piece.encode() for piece in pieces):
            self.wfile.write(bytes([0x81, len(data)]) + data)
        if end == "closed":
            self.wfile.write(bytes([0x88, 2]) + (1000).to_bytes(2))
            self.rfile.read(8)  # its answer: closed with that unread, the connection would be reset
        elif end == "silent":
            with contextlib.suppress(ConnectionError):
                self.rfile.read(1)  # until the other side gives up
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...


@contextlib.contextmanager
def served(server: Server) -> Iterator[Server]:
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


RAY = """\
#!{python} -IS
# stands for Ray's cluster launcher: its tunnel breaks with the first connection through it that has followed a log
import os, socket, sys, threading

def up(near, far, follows):
    while data := near.recv(65536):
        if b"/logs/tail" in data:
            follows.set()
        far.sendall(data)
    far.shutdown(socket.SHUT_WR)

def down(near, far, follows):
    while data := far.recv(65536):
        near.sendall(data)
    if follows.is_set():
        os._exit(0)
    near.shutdown(socket.SHUT_WR)

server = socket.create_server(("127.0.0.1", int(sys.argv[3])))
while True:
    ends = server.accept()[0], socket.create_connection(("127.0.0.1", {port})), threading.Event()
    for target in (up, down):
        threading.Thread(target=target, args=ends, daemon=True).start()
"""


@pytest.mark.parametrize("kind", ["ray", "vms"])
def test_output_goes_on_where_it_stopped(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_output, "_PAUSE", 0.0)
    monkeypatch.setattr(follow, "PATIENCE", 60.0)
    with served(Server(FAILING, 4, faults=("503", "html", "cut", "503"))) as server:
        where = {"address": server.address} if kind == "ray" else {"file": str(tmp_path / "own.yaml")}
        (tmp_path / "ray").write_text(RAY.format(python=sys.executable, port=server.server_port), encoding="utf-8")
        (tmp_path / "ray").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        text = b"".join(output_of(Handle(kind, "7", "digits", where), follow=True)).decode()
    assert text == "one\ntwo\nthree\nfo\u00fcr\nfive\n"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1  # the other faults are of the same silence
    assert said[0].startswith(f"dltrain: the Ray cluster at {server.address if kind == 'ray' else 'http://127.0.0.1:'}")
    assert " does not answer for 7: " in said[0]
    assert said[0].endswith(": asking again")


def test_a_connection_without_a_word_is_made_anew(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_output, "_PAUSE", 0.0)
    monkeypatch.setattr(ray_jobs, "_SILENCE", 0.5)
    with served(Server(DEAD, 2)) as server:
        text = b"".join(output_of(Handle("ray", "7", "digits", {"address": server.address}), follow=True)).decode()
    assert text == "one\ntwo\nthree\nfour\n"
    words = f"dltrain: the Ray cluster at {server.address} has said nothing of 7 for 0.5 s: asking again"
    assert set(capsys.readouterr().err.splitlines()) == {words}  # as something may be missing that is not to come


def test_how_a_job_ended_is_said_though_its_output_is_gone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_output, "_PAUSE", 0.0)
    with served(Server([([], "500")], 0)) as server:
        assert show(Handle("ray", "7", "digits", {"address": server.address})) == 0
    said = capsys.readouterr()
    assert said.out.startswith("digits/ray-7: finished (SUCCEEDED")
    assert said.err.endswith(": what else the job prints is not shown\n")


def broken() -> Iterator[str]:
    yield "a"
    raise RunFailed("broken")


@pytest.mark.parametrize(
    ("states", "says"),
    [
        ([JobState("unknown")], "broken"),  # nobody will come to know it again
        ([JobState("running"), JobState("finished")], "broken"),  # the machine with its output is gone
        ([JobState("running"), RunFailed("away")], "away"),
        ([RunFailed("nowhere")], "nowhere"),
    ],
)
def test_patience_ends(states: list[JobState | RunFailed], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_output, "_PAUSE", 0.0)
    monkeypatch.setattr(follow, "PATIENCE", -1.0)
    left = list(states)

    def state() -> JobState:
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, RunFailed):
            raise found
        return found

    got: list[bytes] = []
    with pytest.raises(RunFailed, match=says):
        got.extend(ray_output.followed(broken, state))
    assert got in ([], [b"a"])


def test_what_is_printed_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_output, "_PAUSE", 0.0)
    now = [0.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: now[0])
    states = iter([JobState("running"), None, None, JobState("finished")])

    def state() -> JobState:
        if (found := next(states)) is None:
            raise RunFailed("away")
        return found

    def first() -> Iterator[str]:
        raise RunFailed("away")
        yield ""

    def long() -> Iterator[str]:
        yield "a"
        now[0] += 3600.0
        raise RunFailed("broken")

    tails = iter([first(), long(), iter(["ab"]), iter(["abc"])])
    assert b"".join(ray_output.followed(lambda: next(tails), state)) == b"abc"
