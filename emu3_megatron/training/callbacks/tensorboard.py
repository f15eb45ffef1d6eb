"""TensorBoard scalars."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import is_rank_zero

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

GROUPS = ("loss", "accuracy", "tokens", "validation")
"""Names that start with one of these and ``_`` are shown together; the rest are under ``train``."""


class TensorBoard(Callback):
    """Writes every number of a step's report as a scalar, on rank 0."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


def tag(name: str) -> str:
    """``loss_text`` -> ``loss/text``; names of no group -> ``train/name``."""
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in GROUPS and rest and name != "tokens_per_second" else f"train/{name}"
