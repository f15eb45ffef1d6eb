"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import unwrap

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

WARM_UP = 10
"""The decay used after k updates is at most (1 + k) / (WARM_UP + k), so that early weights are forgotten."""


SLICE = 2**28
"""Weights that are copied to fp32 at a time, where they are in half precision: 1 GiB."""


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
        for average, parameter in zip(self._flat, self._parameters, strict=True):
            average.copy_(parameter)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Follow the weights."""
        if report.skipped:
            return
        updates = trainer.progress.updates
        decay = min(self._decay, (1 + updates) / (WARM_UP + updates))
        for averages, parameters in self._slices():
            weights = [p if p.dtype == torch.float32 else p.float() for p in parameters]
            torch._foreach_lerp_(averages, weights, 1.0 - decay)
            del weights  # or two slices would live while the next one is made

    def _slices(self) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Averages and their weights, in lists of at most `SLICE` elements; larger ones are cut."""
        averages: list[torch.Tensor] = []
        parameters: list[torch.Tensor] = []
        size = 0
        for whole in zip(self._flat, self._parameters, strict=True):
            for average, parameter in zip(*(tensor.view(-1).split(SLICE) for tensor in whole), strict=True):
                if averages and size + average.numel() > SLICE:
                    yield averages, parameters
                    averages, parameters, size = [], [], 0
                averages.append(average)
                parameters.append(parameter)
                size += average.numel()
        yield averages, parameters
