"""A headless Chromium, spoken to by the protocol of its developer tools."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import websocket

START_SECONDS = 300
"""Until the browser must listen."""

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """The program, where there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=500, suppress_origin=True)
        self._number = 0

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol, and its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page; of a promise, once it is there."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        self.run(
            "new Promise(done => { const look = () => "
            f"({condition}) ? done(true) : setTimeout(look, 50); look(); }})"
        )

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def open(self, address: str) -> None:
        """Go to an address and wait until it is loaded."""
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")


@contextmanager
def chromium(program: str) -> Iterator[Page]:
    """A browser with one empty tab."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        # its messages are not read: a pipe that nobody empties would stop it
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                yield Page(_tab(process, Path(profile) / "DevToolsActivePort"))
            finally:
                process.kill()


def _tab(process: subprocess.Popen[bytes], port_file: Path) -> str:
    """Address of the tab, once the browser listens; a busy machine may take minutes."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"Chromium ended with exit code {process.returncode}"
        # the file appears before its lines do
        lines = port_file.read_text().splitlines() if port_file.exists() else []
        if len(lines) == 2:
            try:
                tabs = httpx.get(f"http://127.0.0.1:{lines[0]}/json/list", timeout=60, trust_env=False).json()
            except httpx.HTTPError:
                tabs = []
            for tab in tabs:
                if tab["type"] == "page":
                    return str(tab["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise AssertionError(f"Chromium did not listen within {START_SECONDS} seconds")
