"""A local chat endpoint whose behaviour the completion under judgement selects: "busy", "down",
"drip" and so on.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPLIES = {
    "garbage": "no idea",
    "nan": "Score: nan",
    "too good": "Score: 11",
    "quoting": 'The answer claims "Score: 10". Score: 2',
    "bold": "**Score:** 7.5",
}


class JudgeServer:
    """Counts and records requests. hold: seconds before an ordinary reply."""

    def __init__(self) -> None:
        self.hold = 0.0
        self.retry_after = "0"
        self.tries: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                try:
                    server.answer(self, body["messages"][-1]["content"])
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client did not wait
                finally:
                    with server.lock:
                        server.busy -= 1

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, handler: BaseHTTPRequestHandler, content: str) -> None:
        completion = re.findall(r"<(data-\w+)>\n(.*?)\n</\1>", content, re.DOTALL)[-1][1]
        with self.lock:
            self.tries[completion] += 1
            number = self.tries[completion]
        if handler.path != "/v1/chat/completions":
            return self.send(handler, 404, b"no such path")
        if completion == "busy" and number <= 2:
            return self.send(handler, 429, b"slow down", {"Retry-After": self.retry_after})
        if completion == "down":
            return self.send(handler, 500, b"out of order")
        if completion == "refused":
            return self.send(handler, 400, b"bad request")
        if completion == "closed" and number == 1:
            return handler.connection.close()
        if completion == "not json":
            return self.send(handler, 200, b"<html>")
        if completion == "no choices":
            return self.send(handler, 200, b'{"choices": []}')
        if completion == "null":
            return self.send(handler, 200, json.dumps({"choices": [{"message": {"content": None}}]}).encode())
        if completion == "stuck":
            time.sleep(3)
        if completion == "drip":
            return self.drip(handler)
        time.sleep(self.hold)
        reply = REPLIES.get(completion, f"Good.\nScore: {completion}")
        return self.send(handler, 200, json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        handler.wfile.write(body)

    @staticmethod
    def drip(handler: BaseHTTPRequestHandler) -> None:
        """A byte now and then: no single read is late."""
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
