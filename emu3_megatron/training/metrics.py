"""What one step measured: sums kept on the device, reduced once, and turned into named numbers.

Legend: S sources, C token classes (`Modality`), Q quantities of a cell (`QUANTITIES`), E quantities that the
objective adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from emu3_megatron.data.loader import Batch
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


def cells_of(batch: Batch, classes: torch.Tensor) -> torch.Tensor:
    """int64 ``[1, T]``: source * C + class of each label, the row of the sums that it counts in."""
    return batch.source_of_tokens.long().clamp_min(0) * len(CLASSES) + classes


@dataclass(frozen=True)
class MetricsLayout:
    """Where each sum stands in the one vector that is reduced at the end of a step."""

    sources: tuple[str, ...]
    quantities: tuple[str, ...] = ()
    """Names of the sums that the objective adds."""

    @property
    def cells(self) -> int:
        """Rows of the sums: one for each source and class."""
        return len(self.sources) * len(CLASSES)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.cells * len(QUANTITIES) + len(self.quantities) + len(EXTRAS)

    def vector(self, sums: torch.Tensor, extras: dict[str, float]) -> torch.Tensor:
        """Join `sums` and named extras (absent ones are 0) into float64 ``[size]``.

        Args:
            sums: float64 ``[S*C*Q + E]``.
            extras: By the names of `EXTRAS`.
        """
        tail = torch.tensor([extras.get(name, 0.0) for name in EXTRAS], dtype=torch.float64)
        return torch.cat([sums, tail.to(sums.device)])

    def totals(self, vector: torch.Tensor) -> Totals:
        """Read a reduced vector; this is the step's one copy to the host."""
        values = vector.detach().to("cpu", torch.float64).numpy()
        cells, own, extras = np.split(values, np.cumsum([self.cells * len(QUANTITIES), len(self.quantities)]))
        return Totals(
            sources=self.sources,
            sums=cells.reshape(len(self.sources), len(CLASSES), len(QUANTITIES)),
            extras=dict(zip(EXTRAS, extras.tolist(), strict=True)),
            quantities=dict(zip(self.quantities, own.tolist(), strict=True)),
        )


@dataclass(frozen=True)
class Totals:
    """Sums over all ranks and micro-batches of one step."""

    sources: tuple[str, ...]
    sums: npt.NDArray[np.float64]
    """``[S, C, Q]``."""
    extras: dict[str, float] = field(default_factory=dict)
    quantities: dict[str, float] = field(default_factory=dict)
    """Sums that the objective added, by name."""

    @classmethod
    def added(cls, parts: Sequence[Totals]) -> Totals:
        """Several steps as one; their extras are left out."""
        names = parts[0].quantities
        return cls(
            sources=parts[0].sources,
            sums=np.sum([part.sums for part in parts], axis=0),
            quantities={name: sum(part.quantities[name] for part in parts) for name in names},
        )

    def loss(self, weights: npt.NDArray[np.float64], source: int | None = None) -> float:
        """Weighted mean of the cross entropy, in nats; NaN where no target has a weight.

        Args:
            weights: Of every class in every source, ``[S, C]``.
            source: Only the documents of this one.
        """
        rows = range(len(self.sources)) if source is None else [source]
        alike: dict[bytes, list[int]] = {}  # sources of equal weights are added up before they are weighted
        for row in rows:
            alike.setdefault(weights[row].tobytes(), []).append(row)
        entropy = total = 0.0
        for members in alike.values():
            here = weights[members[0]]
            used = here > 0
            sums = self.sums[members].sum(axis=0)[used]
            entropy += float(here[used] @ sums[:, 0])
            total += float(here[used] @ sums[:, 2])
        return entropy / total if total > 0 else float("nan")

    def named(self) -> dict[str, float]:
        """Loss, accuracy and count of every class, and loss and accuracy of every source's classes, where
        there are targets.

        Keys: ``loss_text``, ``accuracy_text``, ``tokens_text``, and so on for every class; with more than one
        source also ``loss_SOURCE_text``, ``accuracy_SOURCE_text`` and so on.
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
            for modality, (entropy, correct, tokens) in zip(CLASSES, rows, strict=True):
                if modality != Modality.PADDING and tokens:
                    name = f"{source}_{modality.name.lower()}"
                    values[f"loss_{name}"] = entropy / tokens
                    values[f"accuracy_{name}"] = correct / tokens
        return values


@dataclass
class StepReport:
    """One finished optimizer step, as every callback sees it."""

    step: int
    """Steps taken so far, this one included."""
    windows: int
    """Windows consumed so far."""
    totals: Totals
    loss: float
    """The objective's value; for next-token prediction the weighted cross entropy, nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    skipped: bool = False
    """The update was left out, see `guard`."""
    seconds: float = 0.0
    """Wall time of the step on rank 0, waiting for data included."""
    values: dict[str, float | int] = field(default_factory=dict)
    """Everything above under the names of metrics.jsonl; callbacks may add to it."""
