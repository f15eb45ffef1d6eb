"""Everything that cuts across the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from emu3_megatron.training.callbacks.average import WeightAverage
from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.callbacks.checkpoint import SaveCheckpoints
from emu3_megatron.training.callbacks.guard import SpikeGuard, UnstableRunError
from emu3_megatron.training.callbacks.heartbeat import Heartbeat, is_monitored
from emu3_megatron.training.callbacks.metrics import MetricsFile
from emu3_megatron.training.callbacks.profiler import Profiler
from emu3_megatron.training.callbacks.progress import ProgressBar
from emu3_megatron.training.callbacks.samples import Samples
from emu3_megatron.training.callbacks.stop import StopAfterMinutes, StopOnSignal
from emu3_megatron.training.callbacks.stragglers import Stragglers, spread
from emu3_megatron.training.callbacks.tensorboard import TensorBoard
from emu3_megatron.training.callbacks.validation import Validation
from emu3_megatron.training.callbacks.watchdog import HangWatchdog
from emu3_megatron.training.consumed import METRICS_FILE

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

__all__ = ["Callback", "UnstableRunError", "WeightAverage", "build_callbacks", "spread"]


def build_callbacks(trainer: Trainer, average: WeightAverage | None) -> list[Callback]:
    """The callbacks that a configuration asks for, in the order they are called.

    What adds numbers to a report stands before what writes them; what saves and stops comes last.
    """
    config, run = trainer.config, Path(trainer.config.run)
    callbacks: list[Callback] = [SpikeGuard(config.guard)]
    if config.guard.hang_minutes:
        callbacks.append(HangWatchdog(run / "stacks", config.guard.hang_minutes))
    if is_monitored():
        callbacks.append(Heartbeat())
    if average is not None:
        callbacks.append(average)
    if config.data.validation:
        callbacks.append(Validation(config.validation))
    callbacks.append(MetricsFile(run / METRICS_FILE))
    if config.logging.tensorboard:
        callbacks.append(TensorBoard(run / "tensorboard", config.logging.histogram_interval))
    if config.logging.progress:
        callbacks.append(ProgressBar())
    if config.logging.straggler_interval:
        callbacks.append(Stragglers(config.logging.straggler_interval))
    if config.samples.interval:
        callbacks.append(Samples(config.samples, run / "tensorboard"))
    if config.profiler.start is not None:
        callbacks.append(Profiler(config.profiler, run / "profile"))
    callbacks.append(SaveCheckpoints(config.checkpoint))
    if config.trainer.max_minutes is not None:
        callbacks.append(StopAfterMinutes(config.trainer.max_minutes))
    callbacks.append(StopOnSignal())
    return callbacks
