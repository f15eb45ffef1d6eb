"""TensorBoard scalars."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import is_rank_zero, unwrap

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

GROUPS = ("loss", "accuracy", "tokens", "validation")
"""Names that start with one of these and ``_`` are shown together; the rest are under ``train``."""


class TensorBoard(Callback):
    """Writes every number of a step's report as a scalar, on rank 0, and histograms of its weights.

    Args:
        folder: Where to.
        histogram_interval: Steps between histograms of the weights that rank 0 holds; 0: none.
    """

    def __init__(self, folder: Path, histogram_interval: int = 0) -> None:
        self._folder = folder
        self._histogram_interval = histogram_interval
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open; steps that are taken again replace the older curve from there on."""
        if is_rank_zero():
            # Slow to import, and only one rank needs it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=trainer.progress.step + 1)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Add the scalars."""
        if self._writer is not None:
            for name, value in report.values.items():
                if name != "step":
                    self._writer.add_scalar(tag(name), value, report.step)
            if self._histogram_interval and report.step % self._histogram_interval == 0:
                self._add_histograms(trainer, report.step)

    def _add_histograms(self, trainer: Trainer, step: int) -> None:
        for number, chunk in enumerate(trainer.chunks):
            for name, parameter in unwrap(chunk).named_parameters():
                group = f"weights {number}" if len(trainer.chunks) > 1 else "weights"
                self._writer.add_histogram(f"{group}/{name}", parameter.detach().float().cpu(), step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


def tag(name: str) -> str:
    """``loss_text`` -> ``loss/text``; names of no group -> ``train/name``."""
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in GROUPS and rest and name != "tokens_per_second" else f"train/{name}"
