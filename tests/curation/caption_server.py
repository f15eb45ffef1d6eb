"""An OpenAI-compatible server with injected failures: a process of its own.

``python caption_server.py LOG [FAILURE ...]``: prints its port; the first tries of every picture meet the
FAILUREs in turn (a status, ``hang``, ``drop``, ``garbage``), the next one is answered. Only two hang; where
it would be the turn of more, they are dropped. LOG gets a line for every request: what the picture is (digest
of its pixels), the number of pictures, and how it ended.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

LOG, FAILURES = Path(sys.argv[1]), sys.argv[2:]
TRIES: Counter[str] = Counter()
HANGING: Counter[str] = Counter()
LOCK = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """``/v1/models``."""
        self._answer(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        """``/v1/chat/completions``."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        content = body["messages"][0]["content"]
        pictures = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        sizes, digest = [], hashlib.sha256()
        for url in pictures:
            encoded = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
            sizes.append(Image.open(io.BytesIO(encoded)).size)
            digest.update(encoded)
        name = digest.hexdigest()[:12]
        with LOCK:
            failure = FAILURES[TRIES[name]] if TRIES[name] < len(FAILURES) else "ok"
            TRIES[name] += 1
            HANGING.update([failure])
            failure = "drop" if failure == "hang" and HANGING["hang"] > 2 else failure
            row = {"picture": name, "pictures": len(pictures), "sizes": sizes, "end": failure}
            with open(LOG, "a") as log:
                log.write(json.dumps({**row, "time": time.monotonic(), "model": body["model"]}) + "\n")
        if failure == "ok":
            caption = f"{len(pictures)} pictures {name}"
            self._answer(200, {"choices": [{"message": {"content": caption}, "finish_reason": "stop"}]})
        elif failure == "hang":
            time.sleep(60)
        elif failure == "garbage":
            self._answer(200, {"choices": []})
        elif failure.isdigit():
            self._answer(int(failure), {"error": "injected"})
        self.close_connection = failure != "ok"

    def _answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if status != 200:  # said, so that a client does not count the end of a kept connection as a try
            self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
