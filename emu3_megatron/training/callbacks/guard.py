"""Leaves out updates that would harm the model."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.config import GuardConfig
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import is_rank_zero

if TYPE_CHECKING:
    from emu3_megatron.training.checkpoint import Progress
    from emu3_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)

MEMORY = 0.98
"""Decay of the running means of loss and gradient norm."""


class UnstableRunError(RuntimeError):
    """Too many steps in a row had to be skipped."""


class SpikeGuard(Callback):
    """Skips steps with a NaN, an infinity, or (if `spike_factor` is set) a spike, and counts them.

    Loss and norm are global sums, so every rank decides the same without asking. A skipped step consumes its
    windows. What it knows of the steps before is part of the run's `Progress`: a resumed run skips what an
    undisturbed one skips.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config

    def allow_update(self, trainer: Trainer, report: StepReport) -> bool:
        """False for a step that must not change the weights."""
        progress = trainer.progress
        reason = self._reason(report, progress)
        if reason is None:
            _remember(report, progress)
            return True
        progress.skipped_in_a_row += 1
        if is_rank_zero():
            logger.warning("step %d skipped: %s", report.step, reason)
        if progress.skipped_in_a_row >= self._config.max_consecutive:
            raise UnstableRunError(
                f"{progress.skipped_in_a_row} steps in a row were skipped, the last because "
                f"{reason}; resume from an earlier "
                f"checkpoint with a lower optimizer.learning_rate, or raise guard.max_consecutive"
            )
        return False

    def _reason(self, report: StepReport, progress: Progress) -> str | None:
        """Why a step must be skipped; None where it need not."""
        compared = (
            ("loss", report.loss, progress.mean_loss),
            ("grad_norm", report.grad_norm, progress.mean_grad_norm),
        )
        for name, value, _ in compared:
            if not math.isfinite(value):
                return f"{name} is {value}"
        if not self._config.spike_factor or progress.judged < self._config.warmup_steps:
            return None
        for name, value, mean in compared:
            limit = self._config.spike_factor * mean / (1.0 - MEMORY**progress.judged)
            if value > limit:
                return (
                    f"{name} {value:.4g} exceeds {limit:.4g}, {self._config.spike_factor:g} "
                    f"times its running mean"
                )
        return None


def _remember(report: StepReport, progress: Progress) -> None:
    """Let a step that is no spike into the running means."""
    progress.skipped_in_a_row = 0
    progress.judged += 1
    progress.mean_loss = MEMORY * progress.mean_loss + (1.0 - MEMORY) * report.loss
    progress.mean_grad_norm = MEMORY * progress.mean_grad_norm + (1.0 - MEMORY) * report.grad_norm
