"""Traces of a few steps by torch's profiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.config import ProfilerConfig
from emu3_megatron.training.metrics import StepReport

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 1
"""Steps that the profiler runs without recording: its own start would stand in the trace."""


class Profiler(Callback):
    """Writes ``FOLDER/rank-00000-step-00000010.json.gz``, named after the last step recorded.

    Args:
        config: Which steps, which rank.
        folder: RUN/profile.
    """

    def __init__(self, config: ProfilerConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._profile: Any = None
        self._end = 0

    def on_start(self, trainer: Trainer) -> None:
        """Start at once if the first step is to be recorded."""
        self._start_after(trainer.progress.step)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Start, go on, or write."""
        if self._profile is None:
            self._start_after(report.step)
            return
        self._profile.step()
        if report.step == self._end:
            self._profile.stop()
            self._profile = None

    def close(self) -> None:
        """Stop in the middle of a trace; it is not written."""
        if self._profile is not None:
            self._profile.stop()

    def _start_after(self, step: int) -> None:
        if step != self._config.start or torch.distributed.get_rank() != self._config.rank:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        count = self._config.steps
        self._end = step + WARM_UP_STEPS + count
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=WARM_UP_STEPS, active=count, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profile.start()

    def _write(self, profile: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._config.rank:05d}-step-{self._end:08d}.json.gz"
        profile.export_chrome_trace(str(path))
        logger.info("wrote the trace of %d steps to %s", self._config.steps, path)
