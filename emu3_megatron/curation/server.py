"""A captioner behind an OpenAI-compatible server with vision, such as vLLM."""

from __future__ import annotations

import base64
import io
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

from emu3_megatron.curation.captions import CaptionAnswer, CaptionError, CaptionRequest
from emu3_megatron.curation.config import CaptionConfig
from emu3_megatron.errors import UserError, one_line
from emu3_megatron.files import parse_json

TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses that may pass."""

STOP = frozenset({401, 402, 403, 404})
"""Statuses that every request would get: the key, the account, the address or the model is wrong."""

LONGEST_WAIT = 60.0
"""Seconds between two tries, at most."""

JPEG_QUALITY = 92


class RateLimiter:
    """Spaces calls of many threads evenly."""

    def __init__(self, per_minute: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """At most `per_minute` calls a minute; no limit where None."""
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._next = 0.0

    def reserve(self) -> float:
        """Take the next place; seconds to wait for it."""
        with self._lock:
            now = self._clock()
            self._next = max(self._next, now)
            delay = self._next - now
            self._next += self._gap
        return delay


@dataclass(frozen=True)
class _Response:
    """What a server has answered."""

    status: int
    """Of HTTP."""
    content: bytes
    """The body."""
    retry_after: str
    """The header of that name; empty without one."""


class ServerCaptioner:
    """Asks ``/chat/completions``. Safe in threads."""

    def __init__(self, config: CaptionConfig) -> None:
        """Prepare the connection. Raises `UserError` where the server does not answer or names no model."""
        if config.url is None:
            raise UserError(
                "url: give the server's address, such as http://localhost:8000/v1, or a checkpoint"
            )
        key = os.environ.get(config.api_key_variable, "")
        self._config = config
        self._client = httpx.Client(
            base_url=config.url.rstrip("/") + "/",
            timeout=config.timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        self._limiter = RateLimiter(config.requests_per_minute)
        self._stop = threading.Event()
        self.concurrency, self.batch_size = config.concurrency, 1
        self._model = config.model or self._only_model()
        self.name = f"{self._model}, {config.max_tokens} tokens, temperature {config.temperature:g}"

    def _only_model(self) -> str:
        """The model that the server serves."""
        answer = self._send("GET", "models", None)
        names = [str(row.get("id")) for row in answer.get("data", []) if isinstance(row, dict)]
        if len(names) != 1:
            raise UserError(
                f"{self._config.url} serves {len(names)} models ({', '.join(names)}); name one in `model`"
            )
        return names[0]

    def __call__(self, requests: Sequence[CaptionRequest]) -> list[CaptionAnswer | CaptionError]:
        """See `Captioner`."""
        answers: list[CaptionAnswer | CaptionError] = []
        for request in requests:
            try:
                answers.append(self._ask(request))
            except CaptionError as error:
                answers.append(error)
        return answers

    def _ask(self, request: CaptionRequest) -> CaptionAnswer:
        """One request. Raises `CaptionError` where it fails."""
        content: list[dict[str, Any]] = [{"type": "text", "text": request.prompt}]
        content += [{"type": "image_url", "image_url": {"url": _data_url(p)}} for p in request.pictures]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._config.max_tokens,
            "temperature": self._config.temperature,
        }
        answer = self._send("POST", "chat/completions", body)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise CaptionError(f"the server's answer has no caption: {str(answer)[:200]}") from error
        if not isinstance(text, str) or not text.strip():
            raise CaptionError("the server's caption is empty")
        return CaptionAnswer(text.strip(), finished=choice.get("finish_reason") != "length")

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Send until there is an answer or the tries are used up."""
        problem = ""
        for attempt in range(self._config.retries + 1):
            if self._stop.wait(self._limiter.reserve()):
                raise CaptionError("not asked: another request showed that all would fail")
            asked_to_wait = None
            try:
                response = self._exchange(method, path, body)
                if 200 <= response.status < 300:
                    answer = parse_json(response.content)
                    if isinstance(answer, dict):
                        return answer
                    raise ValueError("its answer is no JSON object")
                text = response.content.decode("utf-8", "replace")
                problem = f"status {response.status}: {' '.join(text.split())[:200]}"
                if response.status in STOP:
                    self._stop.set()
                    raise UserError(
                        f"{self._config.url} refuses all requests, {problem}; check url, model and key"
                    )
                if response.status not in TRY_AGAIN:
                    raise CaptionError(f"the server refuses it, {problem}")
                asked_to_wait = _retry_after(response.retry_after)
            except (httpx.RequestError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                problem = f"{type(error).__name__}: {one_line(error)}"
            if attempt < self._config.retries:
                self._stop.wait(asked_to_wait if asked_to_wait is not None else self._pause(attempt))
        if body is None:
            raise UserError(f"{self._config.url} does not answer ({problem}); is the server running?")
        raise CaptionError(f"no answer in {self._config.retries + 1} tries; the last: {problem}")

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> _Response:
        """Send once. The client's own limit is on each read: a server that trickles would never reach it.

        Raises:
            httpx.RequestError: no connection, no whole answer in time, or one that cannot be unpacked.
        """
        deadline = time.monotonic() + self._config.timeout
        content = bytearray()
        with self._client.stream(method, path, json=body) as response:
            for part in response.iter_bytes():
                content += part
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"no whole answer in {self._config.timeout:g} s")
        return _Response(response.status_code, bytes(content), response.headers.get("retry-after", ""))

    def _pause(self, attempt: int) -> float:
        """Seconds before the next try; drawn, so that many do not come back at once."""
        longest = min(LONGEST_WAIT, self._config.first_wait * 2**attempt)
        return longest * random.uniform(0.5, 1.0)


def _retry_after(value: str) -> float | None:
    """Seconds that the server asks to wait by its header, where it does, within reason."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(value)))
    except ValueError:
        return None


def _data_url(picture: Any) -> str:
    """A picture as the address of its own JPEG."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(stream, format="JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
