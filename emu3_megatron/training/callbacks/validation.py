"""Loss on held-out sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from emu3_megatron.data import Batch
from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport, Totals

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

Evaluate = Callable[[Sequence[Batch]], Totals]


class Validation(Callback):
    """Measures the same windows every `interval` steps and adds ``validation_*`` to the step's numbers.

    Args:
        batches: Micro-batches of this rank for each global batch of the held-out windows.
        evaluate: Runs a global batch without gradients.
        weights: Loss weights by class.
        interval: Steps between evaluations.
    """

    def __init__(
        self, batches: Sequence[Sequence[Batch]], evaluate: Evaluate, weights: Sequence[float], interval: int
    ) -> None:
        self._batches = batches
        self._evaluate = evaluate
        self._weights = weights
        self._interval = interval

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Evaluate if it is time, or if this was the last step."""
        last = report.step == trainer.config.trainer.steps
        if report.step % self._interval and not last:
            return
        parts = [self._evaluate(batches) for batches in self._batches]
        totals = Totals(sources=parts[0].sources, sums=sum(part.sums for part in parts), extras={})
        report.values["validation_loss"] = totals.loss(self._weights)
        report.values.update({f"validation_{name}": value for name, value in totals.named().items()})
        for index, source in enumerate(totals.sources):
            report.values[f"validation_loss_{source}"] = totals.source_loss(index, self._weights)
