"""Ends a run early, but orderly: signals and time limit."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import is_rank_zero

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take the nodes away."""


class StopOnSignal(Callback):
    """After SIGTERM or SIGUSR1 on any rank, the run saves and ends with exit code 0 at the end of a step.

    The wish travels to the other ranks with the sums of the step, so it costs no communication of its own; a
    signal that arrives after a step's sums were sent takes effect one step later.
    """

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def on_start(self, trainer: Trainer) -> None:
        """Listen."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, lambda *_: trainer.wish("signals"))

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Stop if any rank was asked to."""
        if report.totals.extras["signals"]:
            _stop(trainer, "a signal asked for it")

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class StopAfterMinutes(Callback):
    """Ends the run when rank 0 has trained for long enough."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._started = 0.0

    def on_start(self, trainer: Trainer) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Tell the other ranks through the next step's sums, then stop."""
        if report.totals.extras["time_is_up"]:
            _stop(trainer, f"trainer.max_minutes={self._minutes:g} have passed")
        elif is_rank_zero() and time.monotonic() - self._started > 60 * self._minutes:
            trainer.wish("time_is_up")


def _stop(trainer: Trainer, reason: str) -> None:
    if is_rank_zero():
        logger.warning(
            "stopping at step %d: %s; the same command goes on from here", trainer.progress.step, reason
        )
    trainer.stop()
