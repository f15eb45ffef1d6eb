"""Ends a process that does not move any more, with the stacks of its threads."""

from __future__ import annotations

import faulthandler
import os
import time
from pathlib import Path
from threading import Event, Thread
from typing import IO, TYPE_CHECKING

import torch

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

LOCK_SECONDS = 30.0
"""How long the interpreter lock may be missing when the time is over."""


class HangWatchdog(Callback):
    """Writes all stacks to ``STACKS/rank-00000.txt`` and ends the process with code 1 when no step ends.

    A thread does it while it holds the interpreter lock: stacks that are read while their threads go on
    running, in a step that is slow and not stuck, take the process down instead. A main thread that waits
    inside a collective for a rank that is gone has released the lock. One that keeps it is left to Python's
    faulthandler, which needs no lock, `LOCK_SECONDS` later; its stack stands still. Under torchrun the end of
    one process ends all, and a restarted run goes on from its newest checkpoint.

    Args:
        folder: Where stacks are written.
        minutes: Longest time between the ends of two steps; saving and validation are part of it.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self._folder = folder
        self._seconds = 60 * minutes
        self._deadline = 0.0
        self._closed = Event()
        self._thread: Thread | None = None
        self._path: Path | None = None
        self._stream: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the file and start the clock."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"rank-{torch.distributed.get_rank():05d}.txt"
        self._stream = open(self._path, "w")  # noqa: SIM115 - closed by `close`
        self._arm()
        self._thread = Thread(target=self._watch, args=(self._stream,), name="hang-watchdog", daemon=True)
        self._thread.start()

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Start the clock again."""
        self._arm()

    def close(self) -> None:
        """Stop the clock; leave no file, since nothing hung."""
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if self._stream is not None and self._path is not None:
            self._stream.close()
            self._path.unlink(missing_ok=True)

    def _arm(self) -> None:
        if self._stream is not None:
            self._deadline = time.monotonic() + self._seconds
            faulthandler.dump_traceback_later(self._seconds + LOCK_SECONDS, exit=True, file=self._stream)

    def _watch(self, stream: IO[str]) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            if self._closed.wait(left):
                return
        faulthandler.dump_traceback(stream)
        os._exit(1)
