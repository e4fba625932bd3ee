"""A W&B server on loopback for the tests: as much of its protocol as one run of the wandb 0.31 client uses.

    with StandIn() as server:             # WANDB_BASE_URL=server.url, any WANDB_API_KEY of 40 characters
        server.fault = Fault("hang")      # from now on; None heals it
        server.steps("run-id")            # the _step of every history row, in the order of the server's lines

The answers were found by watching the client; fields that it needs and does not explain say so.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Fault:
    """What goes wrong with requests whose path matches ``on``.

    Attributes:
        kind: a status code; "hang": no answer; "drop": the connection is closed; "lost answer": done, then closed.
    """

    kind: int | str
    on: str = "graphql|file_stream"


@dataclass
class Run:
    name: str
    project: str
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    config: str = "{}"
    display_name: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    started: bool = False
    alerts: list[tuple[str, str]] = field(default_factory=list)


class StandIn:
    """The server. What it holds outlives :meth:`stop`, so that a test can let it go down and come back."""

    entity = "tester"

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.requests: Counter[str] = Counter()
        self.fault: Fault | None = None
        self.stop_pressed = False
        self.overwritten: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        # Bound all the time, and never listened at: so nobody else gets the port while the server is down.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self._port = self._place.getsockname()[1]
        self.start()

    def start(self) -> None:
        self.closing.clear()
        handler = type("BoundHandler", (_Handler,), {"server_state": self})
        self._http = _Http(("127.0.0.1", self._port), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._place.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def history(self, run: str) -> list[dict[str, Any]]:
        with self.lock:
            rows = self.runs[run].rows if run in self.runs else {}
            return [rows[line] for line in sorted(rows)]

    def steps(self, run: str) -> list[int]:
        return [row["_step"] for row in self.history(run)]

    def graphql(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of one operation; an unknown one has none, which the client takes."""
        match operation:
            case "Viewer":
                teams = {"edges": []}
                return {"viewer": {"id": "u", "entity": self.entity, "username": "t", "flags": "{}", "teams": teams}}
            case "UpsertBucket":
                inserted = given["name"] not in self.runs
                run = self._run(given["name"], given["project"])
                run.started = True
                run.config = given.get("config") or run.config
                run.display_name = given.get("displayName") or run.display_name
                # As at wandb.ai, a client that does not resume writes from line 0 on.
                return {"upsertBucket": {"bucket": self._bucket(run) | {"historyLineCount": 0}, "inserted": inserted}}
            case "RunResumeStatus":
                run = self.runs.get(given["name"])
                project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": self.entity}}
                return {"model": project | {"bucket": self._bucket(run) if run else None}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in given["files"]]
                return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
            case "NotifyScriptableRunAlert":
                run = self._run(given["runName"], given["projectName"])
                run.alerts.append((given["title"], given["severity"]))
                return {"notifyScriptableRunAlert": {"success": True}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case _:
                return {}

    def stream(self, name: str, project: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take over lines of a run's files; a line that was there already is overwritten."""
        run = self._run(name, project)
        for file, chunk in (body.get("files") or {}).items():
            for number, line in enumerate(chunk["content"], start=chunk["offset"]):
                if file == "wandb-history.jsonl":
                    row = json.loads(line)
                    if run.rows.setdefault(number, row) != row:
                        self.overwritten.append((run.rows[number], row))
                        run.rows[number] = row
                elif file == "wandb-summary.json":
                    run.summary = json.loads(line)
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
        return {"exitcode": None, "limits": {}, "stopped": self.stop_pressed}

    def _run(self, name: str, project: str) -> Run:
        return self.runs.setdefault(name, Run(name, project))

    def _bucket(self, run: Run) -> dict[str, Any]:
        tail = [json.dumps(run.rows[max(run.rows)])] if run.rows else []
        return {
            "id": base64.b64encode(run.name.encode()).decode(),
            "name": run.name,
            "displayName": run.display_name,
            "config": run.config,
            "tags": [],
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "stopped": False,
            # Must hold "t", or the client takes the run for one that never started.
            "wandbConfig": json.dumps({"t": 1}) if run.started else None,
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": self.entity}},
        }


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: StandIn

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        fault = server.fault
        if fault is not None and not re.search(fault.on, self.path):
            fault = None
        with server.lock:
            server.requests["faulty" if fault else "served"] += 1
        if fault and fault.kind == "hang":
            server.closing.wait()
        if server.closing.is_set() or (fault and fault.kind in ("hang", "drop")):
            self._drop()
        elif fault and isinstance(fault.kind, int):
            self._reply(fault.kind, {"errors": [{"message": f"injected {fault.kind}"}]})
        else:
            answer = self._serve(body)
            if fault:
                self._drop()
            else:
                self._reply(200, answer)

    do_PUT = do_POST

    def _serve(self, body: bytes) -> Any:
        server = self.server_state
        with server.lock:
            if self.path == "/graphql":
                request = json.loads(body)
                named = re.match(r"\s*(?:query|mutation)\s+(\w+)", request.get("query", ""))
                operation = request.get("operationName") or (named[1] if named else "")
                return {"data": server.graphql(operation, request.get("variables") or {})}
            if stream := re.match(r"/files/(?:[^/]+/)?([^/]+)/([^/]+)/file_stream$", self.path):
                return server.stream(stream[2], stream[1], json.loads(body))
            return {}

    def _reply(self, code: int, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client has closed it before
            self.connection.shutdown(socket.SHUT_RDWR)
