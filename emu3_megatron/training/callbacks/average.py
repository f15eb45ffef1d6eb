"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import unwrap

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

WARM_UP = 10
"""The decay used after k updates is at most (1 + k) / (WARM_UP + k), so that early weights are forgotten."""


class WeightAverage(Callback):
    """Keeps ``average = decay * average + (1 - decay) * weights`` in fp32, on every rank for what it holds.

    Args:
        chunks: Wrapped chunks of this rank.
        decay: Share of the old average kept at each update.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], decay: float) -> None:
        self._decay = decay
        self._parameters = [parameter.data for chunk in chunks for parameter in unwrap(chunk).parameters()]
        self.averages: list[dict[str, torch.Tensor]] = [
            {name: parameter.detach().float().clone() for name, parameter in unwrap(chunk).named_parameters()}
            for chunk in chunks
        ]
        """For each chunk: parameter name -> fp32 average."""
        self._flat = [tensor for average in self.averages for tensor in average.values()]

    def restart(self) -> None:
        """Begin again at the present weights, for a run that starts from another one's."""
        torch._foreach_copy_(self._flat, [parameter.float() for parameter in self._parameters])

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Follow the weights."""
        if report.skipped:
            return
        updates = trainer.progress.updates
        decay = min(self._decay, (1 + updates) / (WARM_UP + updates))
        weights = [p if p.dtype == torch.float32 else p.float() for p in self._parameters]
        torch._foreach_lerp_(self._flat, weights, 1.0 - decay)
