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

SHOWN = (
    ("text", "loss_text", "{:.3f}"),
    ("vision", "loss_vision", "{:.3f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("padding", "padding_fraction", "{:.1%}"),
    ("wait", "data_wait_fraction", "{:.0%}"),
    ("GiB", "memory_gib", "{:.1f}"),
)
"""Label, name in metrics.jsonl, and form of what follows loss and gradient norm."""


class ProgressBar(Callback):
    """Steps done, loss and gradient norm, and the arithmetic of the step: see `SHOWN`."""

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
            shown |= {
                key: form.format(report.values[name]) for key, name, form in SHOWN if name in report.values
            }
            if trainer.progress.skipped:
                shown["skipped"] = str(trainer.progress.skipped)
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.close()
