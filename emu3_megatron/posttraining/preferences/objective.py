"""Direct preference optimisation with a weighted cross entropy, under any layout.

Legend: T tokens of a micro-batch, L this rank's share under context parallelism, R answers (chosen, rejected,
chosen, ...: twice the pairs), P pairs, C classes of tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from emu3_megatron.data.loader import Batch
from emu3_megatron.data.window import NO_SOURCE
from emu3_megatron.posttraining.preferences.config import DPOConfig
from emu3_megatron.training.config import LossConfig
from emu3_megatron.training.metrics import CLASSES, Totals
from emu3_megatron.training.objective import Loss, MicroBatch, Prepared
from emu3_megatron.training.step import Groups

QUANTITIES = (
    "pairs",
    "dpo",
    "preferred",
    "reward_chosen",
    "reward_rejected",
    "log_probability_chosen",
    "log_probability_rejected",
    "cross_entropy",
    "cross_entropy_weight",
)
"""Sums over pairs, and over tokens for the last two."""

SEQUENCE, COUNTED, WEIGHT = "sequence", "counted", "weight"
REFERENCE, LENGTHS = "reference", "lengths"


class Reference(Protocol):
    """Gives a model's log-probabilities of the answers of a step's windows."""

    def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """For each micro-batch float64 ``[R, C]``: sums by class over each answer. All ranks call it
        together; only what the last pipeline stage gets is used."""
        ...


@dataclass(frozen=True)
class Answers:
    """Which tokens of a micro-batch belong to which answer."""

    sequence_T: torch.Tensor
    """int64: number of the answer; R where there is padding."""
    source_R: torch.Tensor
    """int64: source of each."""
    document_R: torch.Tensor
    """int64: number of its pair in the source."""

    @classmethod
    def of(cls, batch: Batch) -> Answers:
        """Read them from the segments of windows of pairs."""
        is_answer = batch.source != NO_SOURCE
        count = int(is_answer.sum())
        number_D = torch.where(is_answer, is_answer.long().cumsum(0) - 1, count)
        return cls(
            sequence_T=torch.repeat_interleave(number_D, batch.cu_seqlens.diff().long()),
            source_R=batch.source[is_answer].long(),
            document_R=batch.document[is_answer],
        )

    @property
    def count(self) -> int:
        """Number of answers, twice the pairs."""
        return len(self.source_R)


def pair_losses(
    policy_R: torch.Tensor, reference_R: torch.Tensor, *, beta: float, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each pair, and the rewards ``beta * (policy - reference)`` of each answer.

    Args:
        policy_R: log-probabilities of chosen and rejected answers in turn.
        reference_R: those of the reference.
        beta: see `DPOConfig`.
        label_smoothing: see `DPOConfig`.

    Returns:
        ``[P]`` and ``[P, 2]``.
    """
    rewards_P2 = beta * (policy_R - reference_R).reshape(-1, 2)
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    losses_P = -(1 - label_smoothing) * F.logsigmoid(margin_P) - label_smoothing * F.logsigmoid(-margin_P)
    return losses_P, rewards_P2


class DPO:
    """The objective of windows of pairs, see `DPOConfig` for its formula.

    The loss of a step is the mean over its pairs, plus the weighted mean of the chosen answers' cross
    entropy.

    Args:
        config: The loss.
        loss: Weights by class of the cross entropy; their chunk size is used too. A prompt's weight lets its
            tokens count, once for each pair.
        reference: The reference.
        groups: Process groups.
    """

    quantities = QUANTITIES

    def __init__(self, config: DPOConfig, loss: LossConfig, reference: Reference, groups: Groups) -> None:
        self._config, self._reference, self._groups = config, reference, groups
        self._chunk_size = loss.chunk_size
        self._weights_C = torch.tensor(loss.by_class(), dtype=torch.float64)
        self._counted_C = torch.zeros(len(CLASSES), dtype=torch.bool)
        self._counted_C[config.counted_classes] = True

    # ---- before the forward pass

    def denominators(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Pairs, and the sum of the weights of the chosen answers' labels: float64 ``[2]``."""
        pairs = weights = 0.0
        for batch in batches:
            answers = Answers.of(batch)
            pairs += answers.count / 2
            weights += float(self._weights_T(batch, answers).sum())
        return torch.tensor([pairs, weights], dtype=torch.float64)

    def _weights_T(self, batch: Batch, answers: Answers) -> torch.Tensor:
        """Weight of each label in the cross entropy, 0 for rejected answers.

        Padding has the even number after the last answer's, as a chosen answer would: it counts for nothing
        because its class has weight 0.
        """
        is_chosen_T = answers.sequence_T % 2 == 0
        return self._weights_C[batch.modality.reshape(-1).long()] * is_chosen_T

    def prepare(self, batches: Sequence[Batch]) -> list[Prepared]:
        """Answers' numbers, lengths and reference log-probabilities."""
        references = self._reference(batches)
        return [self._prepared(*pair) for pair in zip(batches, references, strict=True)]

    def _prepared(self, batch: Batch, reference_RC: torch.Tensor) -> Prepared:
        answers = Answers.of(batch)
        classes = batch.modality.long()
        counted_T = self._counted_C[classes.reshape(-1)]
        lengths = torch.zeros(answers.count + 1, dtype=torch.int64)
        lengths.index_add_(0, answers.sequence_T, counted_T.long())
        return Prepared(
            classes,
            tokens={
                SEQUENCE: answers.sequence_T[None],
                COUNTED: counted_T[None],
                WEIGHT: self._weights_T(batch, answers).float()[None],
            },
            whole={
                REFERENCE: reference_RC[:, self._counted_C].sum(1),
                LENGTHS: lengths[:-1].clamp_min(1),
            },
        )

    # ---- after it

    def loss(self, model: Any, hidden_L1H: torch.Tensor, batch: MicroBatch, scales_N: torch.Tensor) -> Loss:
        """The micro-batch's part, see `Objective.loss`."""
        losses_L, correct_L = model.token_losses(hidden_L1H, batch.labels_1L, chunk_size=self._chunk_size)
        reference_R, lengths_R = batch.whole[REFERENCE], batch.whole[LENGTHS]
        log_p_R = self._sums_by_answer(losses_L, batch, len(reference_R))
        if self._config.length_normalization:
            log_p_R, reference_R = log_p_R / lengths_R, reference_R / lengths_R
        losses_P, rewards_P2 = pair_losses(
            log_p_R, reference_R, beta=self._config.beta, label_smoothing=self._config.label_smoothing
        )
        weights_L = batch.prepared_L[WEIGHT]
        entropy = (weights_L * losses_L).sum()
        preference = (losses_P.sum() * scales_N[0]).float()
        total = preference + self._config.cross_entropy_weight * entropy * scales_N[1]
        own = self._measured(losses_P, rewards_P2, log_p_R)
        tokens = torch.stack([entropy, weights_L.sum()]).detach().double()
        return Loss(total, losses_L.detach(), correct_L, torch.cat([own, tokens]))

    def _sums_by_answer(self, losses_L: torch.Tensor, batch: MicroBatch, answers: int) -> torch.Tensor:
        """Log-probability of every answer, float64 ``[R]``, whole on every context-parallel rank.

        In fp32 the sum over an image's thousands of tokens would lose what the reward is made of. Its
        gradient goes to this rank's tokens alone: gradients are added up over context-parallel ranks.
        """
        counted_L = torch.where(batch.prepared_L[COUNTED], -losses_L, torch.zeros_like(losses_L)).double()
        own = counted_L.new_zeros(answers + 1).index_add(0, batch.prepared_L[SEQUENCE], counted_L)[:-1]
        if self._groups.context.size() == 1:
            return own
        whole = own.detach().clone()
        torch.distributed.all_reduce(whole, group=self._groups.context)
        return own + (whole - own.detach())

    def _measured(
        self, losses_P: torch.Tensor, rewards_P2: torch.Tensor, log_p_R: torch.Tensor
    ) -> torch.Tensor:
        """The quantities of pairs, float64; they are known whole and counted by the first context rank."""
        margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        sums = [
            torch.ones_like(losses_P).sum(),
            losses_P.sum(),
            # A tie is half a preference, so that a model that is still its reference scores one half.
            ((margin_P > 0).float() + 0.5 * (margin_P == 0).float()).sum().double(),
            *rewards_P2.sum(0),
            *log_p_R.reshape(-1, 2).sum(0),
        ]
        measured = torch.stack(sums).detach()
        return measured if self._groups.is_first_context_rank else torch.zeros_like(measured)

    # ---- reports

    def value(self, totals: Totals, source: int | None = None) -> float:
        """The step's loss; of one source alone it is not known (NaN) unless it is the only one."""
        if source is not None and len(totals.sources) > 1:
            return float("nan")
        values = _means(totals.quantities)
        entropy = self._config.cross_entropy_weight
        return values["loss_dpo"] + (entropy * values["loss_chosen"] if entropy else 0.0)

    def named(self, totals: Totals) -> dict[str, float]:
        """`Totals.named` (both answers' tokens), and means over pairs: ``loss_dpo``, ``loss_chosen``,
        ``preferred`` (share of pairs with a positive margin), ``reward_*``, ``margin``,
        ``log_probability_*``."""
        return {**totals.named(), **_means(totals.quantities)}


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    pairs, weight = sums["pairs"], sums["cross_entropy_weight"]
    nan = float("nan")
    per_pair = {name: sums[name] / pairs if pairs else nan for name in QUANTITIES[1:-2]}
    return {
        "loss_dpo": per_pair.pop("dpo"),
        "loss_chosen": sums["cross_entropy"] / weight if weight else nan,
        **per_pair,
        "margin": per_pair["reward_chosen"] - per_pair["reward_rejected"],
        "pairs": pairs,
    }
