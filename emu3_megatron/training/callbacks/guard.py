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
    from emu3_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)

MEMORY = 0.98
"""Decay of the running means of loss and gradient norm."""


class UnstableRunError(RuntimeError):
    """Too many steps in a row had to be skipped."""


class SpikeGuard(Callback):
    """Skips steps with a NaN, an infinity, or (if `spike_factor` is set) a spike, and counts them.

    Loss and norm are global sums, so every rank decides the same without asking. A skipped step consumes its
    windows. The running means are not saved: after a resume, spikes are judged again after `warmup_steps`.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._means = {"loss": 0.0, "grad_norm": 0.0}
        self._seen = 0
        self._consecutive = 0

    def allow_update(self, trainer: Trainer, report: StepReport) -> bool:
        """False for a step that must not change the weights."""
        now = {"loss": report.loss, "grad_norm": report.grad_norm}
        reason = self._reason(now)
        if reason is None:
            self._consecutive = 0
            self._remember(now)
            return True
        self._consecutive += 1
        if is_rank_zero():
            logger.warning("step %d skipped: %s", report.step, reason)
        if self._consecutive >= self._config.max_consecutive:
            raise UnstableRunError(
                f"{self._consecutive} steps in a row were skipped, the last because "
                f"{reason}; resume from an earlier "
                f"checkpoint with a lower optimizer.learning_rate, or raise guard.max_consecutive"
            )
        return False

    def _reason(self, now: dict[str, float]) -> str | None:
        for name, value in now.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        if not self._config.spike_factor or self._seen < self._config.warmup_steps:
            return None
        for name, value in now.items():
            limit = self._config.spike_factor * self._means[name] / (1.0 - MEMORY**self._seen)
            if value > limit:
                return (
                    f"{name} {value:.4g} exceeds {limit:.4g}, {self._config.spike_factor:g} "
                    f"times its running mean"
                )
        return None

    def _remember(self, now: dict[str, float]) -> None:
        self._seen += 1
        for name, value in now.items():
            self._means[name] = MEMORY * self._means[name] + (1.0 - MEMORY) * value
