"""Which rank the others wait for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import is_rank_zero

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)

NOTEWORTHY = 1.05
"""The slowest rank is named where it takes this times the median."""


def spread(seconds: npt.NDArray[np.float64]) -> dict[str, float | int]:
    """How far ranks' own seconds are apart, under the names of metrics.jsonl; nothing for no ranks.

    Args:
        seconds: ``[ranks]``.
    """
    if not len(seconds):
        return {}
    return {
        "rank_seconds_min": float(seconds.min()),
        "rank_seconds_median": float(np.median(seconds)),
        "rank_seconds_max": float(seconds.max()),
        "slowest_rank": int(seconds.argmax()),
    }


def straggler(seconds: npt.NDArray[np.float64], steps: int) -> str | None:
    """A line that names the slowest rank; None where it is hardly slower than the median.

    Args:
        seconds: ``[ranks]``, sums over `steps` steps.
        steps: How many.
    """
    means = seconds / steps
    slowest, median = int(means.argmax()), float(np.median(means))
    if means[slowest] < NOTEWORTHY * median or median <= 0:
        return None
    return (
        f"slowest of {len(means)} ranks over {steps} steps: rank {slowest}, {means[slowest]:.3g} s a step of "
        f"its own (data and computation), {means[slowest] / median - 1:.0%} over the median of {median:.3g} s"
    )


class Stragglers(Callback):
    """Names the slowest rank every so many steps, where one is clearly slower than the median.

    Args:
        interval: Steps.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._steps = 0
        self._seconds: npt.NDArray[np.float64] = np.zeros(1)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Add up, and say who was slowest when the interval is over."""
        own = report.totals.rank_seconds
        if not len(own):
            return
        self._seconds = self._seconds + own
        self._steps += 1
        if self._steps < self._interval:
            return
        line = straggler(self._seconds, self._steps)
        if line and is_rank_zero():
            logger.warning("%s", line)
        self._steps, self._seconds = 0, np.zeros(1)
