"""Saves every so many steps, and at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.checkpoint_files import CheckpointError
from emu3_megatron.training.config import CheckpointConfig
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import is_rank_zero

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)


class SaveCheckpoints(Callback):
    """Saves when the interval has passed, and wherever the run ends, by whatever cause but a crash.

    Files are written behind the steps that follow; a save is committed at the end of the first step before
    which every rank had written its files, which ranks tell one another with the step's sums. One that fails
    is reported and the run goes on without it; only the last must succeed.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._config = config
        self._saved: int | None = None
        self._pending = False

    def on_start(self, trainer: Trainer) -> None:
        """What was resumed need not be saved again."""
        self._saved = trainer.progress.step

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Commit what is written, and begin to save if it is time."""
        if self._pending and not report.totals.extras["saving"]:
            self._try(self._finish, trainer)
        if report.step % self._config.interval == 0:
            self._try(self._finish, trainer)
            self._try(self._begin, trainer)
            if not self._config.asynchronous:
                self._try(self._finish, trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save the last step."""
        self._try(self._finish, trainer)
        if self._saved != trainer.progress.step:
            self._begin(trainer)
            self._finish(trainer)

    def _begin(self, trainer: Trainer) -> None:
        trainer.begin_save()
        self._saved, self._pending = trainer.progress.step, True

    def _try(self, act: Callable[[Trainer], None], trainer: Trainer) -> None:
        """Do it; a failure is the same on all ranks, is reported on rank 0, and the run goes on."""
        try:
            act(trainer)
        except CheckpointError as error:
            self._saved = None
            if is_rank_zero():
                logger.error("%s; the run goes on", error)

    def _finish(self, trainer: Trainer) -> None:
        """Commit what is pending, if anything is."""
        if not self._pending:
            return
        self._pending = False
        folder = trainer.finish_save()
        if is_rank_zero():
            logger.info("saved %s", folder)
