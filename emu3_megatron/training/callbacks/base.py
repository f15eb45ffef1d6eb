"""What a callback may do, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu3_megatron.training.metrics import StepReport

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer


class Callback:
    """Something that watches or steers a run without being its loop. All ranks have the same callbacks."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, after a resume."""

    def allow_update(self, trainer: Trainer, report: StepReport) -> bool:
        """After the backward pass: False leaves the optimizer's update out. Every rank must answer the
        same."""
        return True

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """After every step; `report` is the same on all ranks, except `seconds`."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, whether the run is finished or stops early; not after an exception."""

    def close(self) -> None:
        """Always, to give back files and signal handlers."""
