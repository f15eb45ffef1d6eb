"""Signs of life from inside a long step: the limit on a step's time is on the time without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")

SIGN_SECONDS = 1.0
"""Least time between two signs."""

_listener: ContextVar[Callable[[], object] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[], object]) -> Iterator[None]:
    """Call `listener` for signs of life in the block, at most one every `SIGN_SECONDS`."""
    last = time.monotonic()

    def seldom() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SIGN_SECONDS:
            last = now
            listener()

    token = _listener.set(seldom)
    try:
        yield
    finally:
        _listener.reset(token)


def alive() -> None:
    """Give a sign of life: a frame was decoded, a window of frames computed. Cheap."""
    listener = _listener.get()
    if listener is not None:
        listener()


def lively(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each a sign of life."""
    for item in items:
        alive()
        yield item
