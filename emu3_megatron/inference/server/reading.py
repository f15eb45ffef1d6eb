"""Clients that do not read what they are sent lose their connection."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_Base: Any = AutoHTTPProtocol


def reading_protocol(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, for its setting ``http``, with a bound on how long a client may not read.

    A transport whose buffer is full waits for the client for ever, closing waits for the buffer too, and both
    keep the answer in memory. Here a buffer must empty within `seconds`, or the connection is cut off.
    """

    class Protocol(_Base):
        _cut_off: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._cut_off = asyncio.get_running_loop().call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._forget()

        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            self._forget()

        def _forget(self) -> None:
            if self._cut_off is not None:
                self._cut_off.cancel()
                self._cut_off = None

    return Protocol
