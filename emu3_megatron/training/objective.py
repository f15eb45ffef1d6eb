"""What windows are trained for: the part of a step that turns token losses into one loss.

The trainer, the schedules, checkpoints and data know nothing of it; they are given an `Objective`.
`NextToken` is pre-training, quality fine-tuning and both stages of understanding: they differ in the weights
of the classes of tokens, source by source.

Legend: T tokens of a micro-batch (all its windows joined), L this rank's share under context parallelism,
S sources, C classes of tokens, N denominators, E quantities of an objective, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from emu3_megatron.data.loader import Batch
from emu3_megatron.grammar.document import Modality
from emu3_megatron.model.dropout import TokenNumbers
from emu3_megatron.training.config import LossConfig, SourceConfig, TrainingConfig
from emu3_megatron.training.metrics import Totals, cells_of
from emu3_megatron.vocabulary import Vocabulary


@dataclass(frozen=True)
class Prepared:
    """What an objective adds to a micro-batch before the forward pass; CPU tensors."""

    classes: torch.Tensor
    """int64 ``[1, T]``: `Modality` of each label, under which it is measured (and weighted)."""
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """``[1, T]`` each: further values by token, which context parallelism splits as it splits the labels."""
    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further values that every rank gets whole, such as one a document."""


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on this rank's device, context-parallel share taken."""

    tokens_1L: torch.Tensor
    labels_1L: torch.Tensor
    cells_L: torch.Tensor
    """int64: source * C + class of each label, the row of the sums that it counts in."""
    packed: Any
    """`PackedSeqParams` of the whole micro-batch."""
    host_cu_seqlens: torch.Tensor
    """Borders that attention does not cross, int32 on the CPU."""
    dropout: TokenNumbers | None
    """What dropout is drawn from; None: there is none."""
    prepared_L: Mapping[str, torch.Tensor]
    """`Prepared.tokens`, this rank's share of each."""
    whole: Mapping[str, torch.Tensor]
    """`Prepared.whole`."""


class Loss(NamedTuple):
    """A micro-batch's part of the step's loss, on this rank."""

    total: torch.Tensor
    """fp32 scalar, differentiable: gradients are those of its sum over micro-batches, data-parallel and
    context-parallel ranks."""
    losses_L: torch.Tensor
    """fp32, detached: -log p(label), for reports."""
    correct_L: torch.Tensor
    """bool: the label is the arg-max."""
    quantities_E: torch.Tensor | None = None
    """float64: addends to `Objective.quantities`. They are added up over micro-batches, data-parallel and
    context-parallel ranks: what every context-parallel rank knows whole is counted by one of them."""


class Objective(Protocol):
    """What a step's windows are trained for. It is made for one list of sources, see `ObjectiveFactory`."""

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of E sums of its own, besides cross entropy, hits and counts by source and class."""
        ...

    def denominators(self, batches: Sequence[Batch]) -> torch.Tensor:
        """This rank's addends to what the loss is divided by, float64 ``[N]``.

        Known before the forward pass; added up over micro-batches (here) and data-parallel ranks (by the
        step).
        """
        ...

    def prepare(self, batches: Sequence[Batch]) -> list[Prepared]:
        """What each micro-batch of a step needs besides its tokens. All ranks call it together, once a step,
        so that another model may look at the windows first."""
        ...

    def loss(self, model: Any, hidden_L1H: torch.Tensor, batch: MicroBatch, scales_N: torch.Tensor) -> Loss:
        """The micro-batch's part of the loss; called on the last pipeline stage only.

        Args:
            model: `Emu3Model`: `weighted_loss` for weights known beforehand, `token_losses` for any other
                function of the losses.
            hidden_L1H: What its last layer gave.
            batch: The micro-batch.
            scales_N: fp32, one over each global denominator; large where a denominator is zero, so what is
                multiplied with it must then be zero.
        """
        ...

    def value(self, totals: Totals, source: int | None = None) -> float:
        """The step's loss from its sums, or that of one source; NaN where nothing was trained."""
        ...

    def named(self, totals: Totals) -> dict[str, float]:
        """Every number to report under its name, `value` excepted."""
        ...


ObjectiveFactory = Callable[[TrainingConfig, Mapping[str, SourceConfig], Vocabulary, torch.device], Objective]
"""Makes the objective for sources in the order of `Batch.source`: once for those of training, once for the
held-out ones."""


class NextToken:
    """Cross entropy weighted by the class of the token and by its source: ``sum(w * ce) / sum(w)``.

    Args:
        losses: Weights of each source, in the order of `Batch.source`.
        end_token: Id of EOS, which has a class of its own where a source gives it a weight of its own.
        device: Where the model is.
        chunk_size: See `LossConfig`; one for all sources.
        z_loss: See `LossConfig`; one for all sources.
    """

    quantities: tuple[str, ...] = ()

    def __init__(
        self,
        losses: Sequence[LossConfig],
        *,
        end_token: int,
        device: torch.device,
        chunk_size: int | None = None,
        z_loss: float = 0.0,
    ) -> None:
        self.weights_SC = torch.tensor([loss.by_class() for loss in losses], dtype=torch.float64)
        """Weight of every class of label in every source."""
        self._weights32 = self.weights_SC.reshape(-1).to(device, torch.float32)
        self._splits_end_S = torch.tensor([loss.end_weight is not None for loss in losses])
        self._end = end_token
        self._chunk_size, self._z_loss = chunk_size, z_loss

    @classmethod
    def make(
        cls,
        config: TrainingConfig,
        sources: Mapping[str, SourceConfig],
        vocabulary: Vocabulary,
        device: torch.device,
    ) -> NextToken:
        """For sources that have the run's weights, or their own; see `ObjectiveFactory`."""
        losses = [source.loss or config.loss for source in sources.values()]
        run = config.loss
        return cls(
            losses,
            end_token=vocabulary.eos,
            device=device,
            chunk_size=run.chunk_size,
            z_loss=run.z_loss,
        )

    def classes(self, batch: Batch) -> torch.Tensor:
        """int64 ``[1, T]``: class of every label; EOS apart where its source weighs it apart."""
        classes = batch.modality.long()
        if self._splits_end_S.any():
            apart = self._splits_end_S[batch.source_of_tokens.long().clamp_min(0)]
            ends = (batch.labels == self._end) & (classes != Modality.PADDING) & (classes != Modality.PROMPT)
            classes = torch.where(ends & apart, int(Modality.END), classes)
        return classes

    def denominators(self, batches: Sequence[Batch]) -> torch.Tensor:
        """The sum of the weights of all labels, float64 ``[1]``."""
        counts = torch.zeros(self.weights_SC.numel(), dtype=torch.float64)
        for batch in batches:
            cells = cells_of(batch, self.classes(batch)).reshape(-1)
            counts += torch.bincount(cells, minlength=len(counts))
        return torch.dot(counts, self.weights_SC.reshape(-1))[None]

    def prepare(self, batches: Sequence[Batch]) -> list[Prepared]:
        """Classes only."""
        return [Prepared(self.classes(batch)) for batch in batches]

    def loss(self, model: Any, hidden_L1H: torch.Tensor, batch: MicroBatch, scales_N: torch.Tensor) -> Loss:
        """Weighted sum, in one pass over the output layer."""
        weights_L = self._weights32[batch.cells_L] * scales_N[0]
        return Loss(
            *model.weighted_loss(
                hidden_L1H, batch.labels_1L, weights_L, chunk_size=self._chunk_size, z_loss=self._z_loss
            )
        )

    def value(self, totals: Totals, source: int | None = None) -> float:
        """Weighted mean of the cross entropy, nats."""
        return totals.loss(self.weights_SC.numpy(), source)

    def named(self, totals: Totals) -> dict[str, float]:
        """By class and source."""
        return totals.named()
