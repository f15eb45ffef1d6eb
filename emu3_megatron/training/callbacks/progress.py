"""A progress bar on rank 0, and one line when the run ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import is_rank_zero

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

LINES_TO_A_FILE = 50
"""Where stderr is not a terminal, the bar is printed this many times over a run, instead of ten times a
second."""


class ProgressBar(Callback):
    """Steps done, speed, loss and gradient norm."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar at the step the run stands at."""
        if not is_rank_zero():
            return
        total, interactive = trainer.config.trainer.steps, sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=trainer.progress.step,
            desc="train",
            unit="step",
            dynamic_ncols=interactive,
            mininterval=0.1 if interactive else 0.0,
            miniters=1 if interactive else max(1, total // LINES_TO_A_FILE),
        )

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Move on."""
        if self._bar is not None:
            shown = {"loss": f"{report.loss:.4f}", "norm": f"{report.grad_norm:.2f}"}
            for name in ("text", "vision"):
                if f"loss_{name}" in report.values:
                    shown[name] = f"{report.values[f'loss_{name}']:.3f}"
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.close()
