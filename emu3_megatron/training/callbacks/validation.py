"""Loss on held-out sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.config import ValidationConfig
from emu3_megatron.training.metrics import StepReport, Totals

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer


class Validation(Callback):
    """Measures the same held-out windows every `interval` steps and adds ``validation_*`` to the step's
    numbers.

    Keys: ``validation_loss`` (weighted as in training), ``validation_loss_text`` and so on by class,
    ``validation_loss_SOURCE`` by source.
    """

    def __init__(self, config: ValidationConfig) -> None:
        self._config = config

    def on_start(self, trainer: Trainer) -> None:
        """Read the windows once; they stay in memory."""
        data = trainer.data
        steps = -(-self._config.windows // trainer.config.trainer.global_batch_size)
        loader = iter(data.validation_loader(trainer.config))
        self._batches = [next(loader) for _ in range(steps)]
        self._measuring = trainer.measuring(trainer.config.data.validation)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Evaluate if it is time, or if this was the last step."""
        last = report.step == trainer.config.trainer.steps
        if report.step % self._config.interval and not last:
            return
        objective = self._measuring.objective
        totals = Totals.added([trainer.evaluate(self._measuring, batches) for batches in self._batches])
        report.values["validation_loss"] = objective.value(totals)
        report.values.update({f"validation_{name}": value for name, value in objective.named(totals).items()})
        if len(totals.sources) > 1:
            for index, source in enumerate(totals.sources):
                report.values[f"validation_loss_{source}"] = objective.value(totals, index)
