"""Ends a process that does not move any more, with the stacks of its threads."""

from __future__ import annotations

import faulthandler
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer


class HangWatchdog(Callback):
    """Writes all stacks to ``STACKS/rank-00000.txt`` and ends the process with code 1 when no step ends.

    It is Python's faulthandler: a thread that needs no interpreter lock, so it works when the main thread
    waits inside a collective for a rank that is gone. Under torchrun the end of one process ends all, and a
    restarted run goes on from its newest checkpoint.

    Args:
        folder: Where stacks are written.
        minutes: Longest time between the ends of two steps; saving and validation are part of it.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self._folder = folder
        self._seconds = 60 * minutes
        self._path: Path | None = None
        self._stream: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the file and start the clock."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"rank-{torch.distributed.get_rank():05d}.txt"
        self._stream = open(self._path, "w")  # noqa: SIM115 - closed by `close`
        self._arm()

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Start the clock again."""
        self._arm()

    def close(self) -> None:
        """Stop the clock; leave no file, since nothing hung."""
        faulthandler.cancel_dump_traceback_later()
        if self._stream is not None and self._path is not None:
            self._stream.close()
            self._path.unlink(missing_ok=True)

    def _arm(self) -> None:
        if self._stream is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._stream)
