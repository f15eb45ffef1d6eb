"""Pictures that the model draws from fixed prompts while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.config import SamplesConfig
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import is_rank_zero, load_by_name, unwrap

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer


class Samples(Callback):
    """Draws `samples.prompts` every `samples.interval` steps into TensorBoard, and after the last step.

    One tensor-parallel group draws, the others wait for it in the next step. No random number of training is
    used, so the loss curve is the same with and without.
    """

    def __init__(self, config: SamplesConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._painter: Any = None
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the tokenizers, where pictures are drawn."""
        from megatron.core import parallel_state

        if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
            painter = load_by_name(self._config.painter, "samples.painter")
            model = unwrap(trainer.chunks[0])
            self._painter = painter(model, trainer.config.model, trainer.data.vocabulary, self._config)
        if is_rank_zero():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=trainer.progress.step + 1)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Draw if it is time."""
        last = report.step == trainer.config.trainer.steps
        if self._painter is None or (report.step % self._config.interval and not last):
            return
        for number, pixels in enumerate(self._painter()):
            if self._writer is not None:
                name = f"samples/{number:02d} {self._config.prompts[number]}"
                self._writer.add_image(name, pixels, report.step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
