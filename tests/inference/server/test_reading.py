"""Clients that do not read, on real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from emu3_megatron.inference.server.body import BoundedBodies
from emu3_megatron.inference.server.limits import Limits
from emu3_megatron.inference.server.reading import reading_protocol

CHUNK, CHUNKS = 1 << 16, 64
LIMITS = Limits(connections=2, send_seconds=0.5)
PATIENCE = 60.0


async def answers(scope: Any, receive: Any, send: Any) -> None:
    """Under ``/stream`` in pieces, under ``/whole`` at once, elsewhere nearly nothing."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/stream":
        for _ in range(CHUNKS):
            await send({"type": "http.response.body", "body": bytes(CHUNK), "more_body": True})
    body = bytes(CHUNK * CHUNKS) if scope["path"] == "/whole" else b""
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(limits: Limits) -> Iterator[tuple[uvicorn.Server, int]]:
    """A server whose sockets hold little, and its port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            BoundedBodies(answers, limits), http=reading_protocol(limits.send_seconds), lifespan="off",
            log_level="critical",
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            eventually(lambda: server.started)
            yield server, listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def ask(port: int, path: str) -> socket.socket:
    """A client that has asked and does not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(PATIENCE)
    client.connect(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return client


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def received(client: socket.socket) -> int:
    """Bytes until the connection ends."""
    total = 0
    try:
        while part := client.recv(1 << 16):
            total += len(part)
    except ConnectionResetError:
        pass
    return total


@pytest.mark.parametrize("path", ["/stream", "/whole"])
def test_who_does_not_read_is_cut_off(path: str) -> None:
    """As many as there are places: others are answered again, and nothing is kept for them."""
    with serving(LIMITS) as (server, port):
        clients = [ask(port, path) for _ in range(LIMITS.connections)]
        eventually(lambda: len(server.server_state.connections) == LIMITS.connections)
        address = f"http://127.0.0.1:{port}/"
        eventually(lambda: httpx.get(address, timeout=PATIENCE, trust_env=False).status_code == 200)
        eventually(lambda: not server.server_state.connections)
        for client in clients:
            assert received(client) < CHUNK * CHUNKS
            client.close()


def test_who_reads_gets_everything() -> None:
    with serving(Limits(connections=2)) as (_, port):
        address = f"http://127.0.0.1:{port}"
        with httpx.Client(timeout=PATIENCE, trust_env=False) as client:
            assert len(client.get(f"{address}/stream").content) == CHUNK * CHUNKS
            assert len(client.get(f"{address}/whole").content) == CHUNK * CHUNKS


def test_an_answer_ends_whatever_the_client_does() -> None:
    """Without uvicorn too: after the time of a job and of sending, the place is free."""
    limits = Limits(connections=1, seconds=0.05, send_seconds=0.05)
    bounded = BoundedBodies(answers, limits)
    sent: list[int] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def never(message: Any) -> None:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message.get("status", 0))

    async def two() -> None:
        for way in (never, send):
            await asyncio.wait_for(bounded({"type": "http", "path": "/"}, receive, way), PATIENCE)

    asyncio.run(two())
    assert sent[0] == 200
