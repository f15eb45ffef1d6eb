"""Bodies are read before anything else, within a size, a time, and a number of connections; answers end."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emu3_megatron.inference.server.limits import Limits


def refusal(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    # a message may quote what a client sent, halves of surrogate pairs included
    message = message.encode("utf-8", "replace").decode()
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(
        {"error": {"message": message, "type": kind, "code": status}}, status_code=status, headers=headers
    )


class _TooLarge(Exception):
    pass


class BoundedBodies:
    """Middleware that passes requests on once their whole body is there, and ends them in time."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._connections = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._connections >= self._limits.connections:
            message = f"the server has {self._connections} connections, and takes no more; try again later"
            await refusal(429, message)(scope, receive, send)
            return
        self._connections += 1
        try:
            await self._bounded(scope, receive, send)
        finally:
            self._connections -= 1

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self._limits
        try:
            body = await asyncio.wait_for(self._read(receive), limits.body_seconds)
        except _TooLarge:
            message = f"the body is larger than {limits.body_bytes} bytes"
            await refusal(413, message)(scope, receive, send)
            return
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {limits.body_seconds:g} seconds"
            await refusal(408, message)(scope, receive, send)
            return
        if body is None:
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        # jobs end by themselves; a client that reads a little now and then would keep its place for ever
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(
                self._app(scope, replay, send), timeout=limits.seconds + limits.send_seconds
            )

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None where the client has gone."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limits.body_bytes:
                raise _TooLarge
            if not message.get("more_body", False):
                return b"".join(parts)
