"""What one step measured: sums kept on the device, reduced once, and turned into named numbers.

Legend: S sources, C token classes (`Modality`), Q quantities (`QUANTITIES`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from emu3_megatron.grammar.document import Modality

QUANTITIES = ("cross_entropy", "correct", "tokens")
"""Sums kept for every source and class: nats, arg-max hits, targets."""

EXTRAS = (
    "padding_tokens",
    "window_tokens",
    "attention_pairs",
    "wait_seconds",
    "signals",
    "time_is_up",
    "saving",
)
"""Further sums of a step over all ranks. `attention_pairs` counts (query, key) pairs under the document mask,
`saving` the ranks that still write their files of a checkpoint."""

CLASSES = tuple(Modality)


@dataclass(frozen=True)
class MetricsLayout:
    """Where each sum stands in the one vector that is reduced at the end of a step."""

    sources: tuple[str, ...]
    ranks: int = 0
    """Ranks whose own seconds are told apart; see `Stopwatch`."""

    @property
    def cells(self) -> int:
        """Rows of the sums: one for each source and class."""
        return len(self.sources) * len(CLASSES)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.cells * len(QUANTITIES) + len(EXTRAS) + self.ranks

    def vector(
        self, sums: torch.Tensor, extras: dict[str, float], *, rank: int = 0, seconds: float = 0.0
    ) -> torch.Tensor:
        """Join what this rank has measured into float64 ``[size]``, to be added up over all ranks.

        Args:
            sums: float64 ``[S*C, Q]``.
            extras: by name; absent ones are 0.
            rank: this rank; it fills a place of its own.
            seconds: this rank's own part of the step.
        """
        own = [0.0] * self.ranks
        if self.ranks:
            own[rank] = seconds
        tail = torch.tensor([*(extras.get(name, 0.0) for name in EXTRAS), *own], dtype=torch.float64)
        return torch.cat([sums.reshape(-1), tail.to(sums.device)])

    def totals(self, vector: torch.Tensor) -> Totals:
        """Read a reduced vector; this is the step's one copy to the host."""
        values = vector.detach().to("cpu", torch.float64).numpy()
        split = self.cells * len(QUANTITIES)
        last = split + len(EXTRAS)
        return Totals(
            sources=self.sources,
            sums=values[:split].reshape(len(self.sources), len(CLASSES), len(QUANTITIES)),
            extras=dict(zip(EXTRAS, values[split:last].tolist(), strict=True)),
            rank_seconds=values[last:],
        )


@dataclass(frozen=True)
class Totals:
    """Sums over all ranks and micro-batches of one step."""

    sources: tuple[str, ...]
    sums: npt.NDArray[np.float64]
    """``[S, C, Q]``."""
    extras: dict[str, float]
    rank_seconds: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """``[ranks]``: each rank's own part of the step, empty where they are not told apart."""

    def loss(self, weights: Sequence[float]) -> float:
        """Cross entropy weighted by class, in nats; NaN where no target has a weight."""
        return _weighted_mean(self.sums.sum(axis=0), weights)

    def source_loss(self, source: int, weights: Sequence[float]) -> float:
        """`loss` over the documents of one source."""
        return _weighted_mean(self.sums[source], weights)

    def named(self) -> dict[str, float]:
        """Loss, accuracy and count of every class, and loss of every source's classes, where there are
        targets.

        Keys: ``loss_text``, ``accuracy_text``, ``tokens_text``, and so on for every class; with more than one
        source also ``loss_SOURCE_text`` and so on.
        """
        values: dict[str, float] = {}
        for modality, (entropy, correct, tokens) in zip(CLASSES, self.sums.sum(axis=0), strict=True):
            if modality == Modality.PADDING or not tokens:
                continue
            name = modality.name.lower()
            values[f"loss_{name}"] = entropy / tokens
            values[f"accuracy_{name}"] = correct / tokens
            values[f"tokens_{name}"] = tokens
        if len(self.sources) > 1:
            values.update(self._by_source())
        return values

    def _by_source(self) -> dict[str, float]:
        values = {}
        for source, rows in zip(self.sources, self.sums, strict=True):
            for modality, (entropy, _, tokens) in zip(CLASSES, rows, strict=True):
                if modality != Modality.PADDING and tokens:
                    values[f"loss_{source}_{modality.name.lower()}"] = entropy / tokens
        return values


def _weighted_mean(rows: npt.NDArray[np.float64], weights: Sequence[float]) -> float:
    """Mean cross entropy of ``[C, Q]`` sums under class weights."""
    used = np.asarray(weights) > 0
    scale = np.asarray(weights)[used]
    total = float(scale @ rows[used, 2])
    return float(scale @ rows[used, 0]) / total if total > 0 else float("nan")


@dataclass
class StepReport:
    """One finished optimizer step, as every callback sees it."""

    step: int
    """Steps taken so far, this one included."""
    windows: int
    """Windows consumed so far."""
    totals: Totals
    loss: float
    """Weighted cross entropy, nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    skipped: bool = False
    """The update was left out, see `guard`."""
    seconds: float = 0.0
    """Wall time of the step on rank 0, waiting for data included."""
    values: dict[str, float | int] = field(default_factory=dict)
    """Everything above under the names of metrics.jsonl; callbacks may add to it."""
