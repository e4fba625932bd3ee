"""The output of a Ray job, followed while the dashboard fails: every line once, and said."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from dltrain.core.errors import RunFailed
from dltrain.launcher.submit import follow, ray_output
from dltrain.launcher.submit.adapter import JobState
from dltrain.launcher.submit.handle import Handle
from dltrain.launcher.submit.jobs import output_of

#: What each connection sends of the log, as far as the job has printed, and how it ends.
CONNECTIONS: list[tuple[list[str], str]] = [
    (["one\ntw"], "dropped"),
    ([], "500"),
    (["one\n", "two\nthr"], "closed"),  # in good order, though the job runs: the dashboard was told to end
    (["one\ntwo\nthree\n", "fo\u00fcr\n"], "closed"),
    (["one\ntwo\nthree\nfo\u00fcr\nfive\n"], "closed"),
]


class Dashboard(BaseHTTPRequestHandler):
    """Of a cluster whose job 7 is over when the fourth connection has ended."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self._answer(200, {"version": "4", "ray_version": "2.60.0"})
        elif self.path == "/api/jobs/7":
            status = "RUNNING" if self.server.tails < 4 else "SUCCEEDED"  # pyright: ignore[reportAttributeAccessIssue]
            self._answer(200, {"type": "SUBMISSION", "submission_id": "7", "status": status, "entrypoint": "x"})
        else:
            pieces, end = CONNECTIONS[self.server.tails]  # pyright: ignore[reportAttributeAccessIssue]
            self.server.tails += 1  # pyright: ignore[reportAttributeAccessIssue]
            if end == "500":
                self._answer(500, {"said": "restarting"})
            else:
                self._tail(pieces, end)

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
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
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # said by Ray
def test_output_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_output, "_PAUSE", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        server.tails = 0  # pyright: ignore[reportAttributeAccessIssue]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        handle = Handle("ray", "7", "digits", {"address": address})
        text = b"".join(output_of(handle, follow=True)).decode()
        server.shutdown()
    assert text == "one\ntwo\nthree\nfo\u00fcr\nfive\n"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1  # the second fault is of the same silence
    assert said[0].startswith(f"dltrain: the Ray cluster at {address} does not answer for 7: ")
    assert said[0].endswith(": asking again")


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

    got: list[str] = []
    with pytest.raises(RunFailed, match=says):
        got.extend(ray_output.followed(broken, state))
    assert got in ([], ["a"])
