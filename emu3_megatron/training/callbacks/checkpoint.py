"""Saves every so many steps, and at the end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import is_rank_zero

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)


class SaveCheckpoints(Callback):
    """Saves when the interval has passed, and wherever the run ends, by whatever cause but a crash."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._saved: int | None = None

    def on_start(self, trainer: Trainer) -> None:
        """What was resumed need not be saved again."""
        self._saved = trainer.progress.step

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Save if it is time."""
        if report.step % self._interval == 0:
            self._save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save the last step."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self._saved != trainer.progress.step:
            folder = trainer.save()
            self._saved = trainer.progress.step
            if is_rank_zero():
                logger.info("saved %s", folder)
