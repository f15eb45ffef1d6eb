"""A proxy that spoils requests on their way to a real server: a process of its own.

``python faulty_proxy.py TARGET_PORT LOG [FAILURE ...]``: prints its port. The first tries of every picture
meet the FAILUREs in turn (a status; ``drop``: the connection ends before the server is asked; ``lost``:
after it has answered; ``hang``), the next one passes. Only one hangs, for longer than
anybody waits; where it would be the turn of more, they are dropped. LOG gets a line for every request: a
digest of its pictures, and how it ended.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TARGET, LOG, FAILURES = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
TRIES: Counter[str] = Counter()
LOCK = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Spoil or pass on."""
        body = self.rfile.read(int(self.headers["content-length"]))
        content = json.loads(body)["messages"][0]["content"]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
        with LOCK:
            failure = FAILURES[TRIES[name]] if TRIES[name] < len(FAILURES) else "ok"
            TRIES.update([name, f" {failure}"])
            failure = "drop" if failure == "hang" and TRIES[" hang"] > 1 else failure
        status, answer = (0, b"")
        if failure in ("ok", "lost"):
            status, answer = self._ask(body)
            failure = failure if status == 200 else f"server's {status}: {answer[:300]!r}"
        with LOCK, open(LOG, "a") as log:
            log.write(json.dumps({"picture": name, "end": failure}) + "\n")
        if failure == "hang":
            time.sleep(600)
        elif failure.isdigit():
            self._answer(int(failure), b"{}")
        elif failure not in ("drop", "lost"):
            self._answer(status, answer)
        self.close_connection = True

    def _ask(self, body: bytes) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", TARGET)
        connection.request("POST", self.path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
