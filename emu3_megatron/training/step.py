"""One step's forward and backward pass: token losses, their weights, and their sums.

The loss of a step is ``sum(w * ce) / sum(w)`` over every target of the global batch, where ``w`` is the
weight of the target's class. The denominator is known before the first forward pass, from the labels' classes
alone, and is added up over data-parallel ranks in float64; so gradients are right whatever the layout, the
number of micro-batches, or how unevenly targets fall on ranks, and a rank without any weighted target is
harmless.

Legend: T tokens of a micro-batch (all its windows joined), L this rank's share under context parallelism,
S sources, C classes, Q quantities, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from emu3_megatron.data.loader import Batch
from emu3_megatron.parallel.context import packed_sequence_parameters, split_batch_for_context_parallel
from emu3_megatron.training.config import LossConfig
from emu3_megatron.training.metrics import CLASSES, QUANTITIES, MetricsLayout
from emu3_megatron.training.modules import unwrap

TINY_WEIGHT = 1e-30
"""Stands in for a global sum of weights of zero: the step then has a loss and gradients of zero."""


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on this rank's device, context-parallel share taken."""

    tokens_1L: torch.Tensor
    labels_1L: torch.Tensor
    classes_L: torch.Tensor
    """int64, `Modality` of each label."""
    cells_L: torch.Tensor
    """int64, row of the sums that each label counts in: source * C + class."""
    packed: Any
    """`PackedSeqParams` of the whole micro-batch."""
    host_cu_seqlens: torch.Tensor
    """Borders of attention, see `attention_borders`, on the CPU."""


@dataclass(frozen=True)
class Groups:
    """The process groups a step speaks to."""

    context: torch.distributed.ProcessGroup
    data: torch.distributed.ProcessGroup
    """Data parallel, without context parallelism."""
    counts_here: bool
    """This rank adds to the sums: last pipeline stage, first of its tensor-parallel group."""
    is_first_context_rank: bool

    @classmethod
    def current(cls) -> Groups:
        """The groups that `initialize_parallel` made."""
        from megatron.core import parallel_state as state

        return cls(
            context=state.get_context_parallel_group(),
            data=state.get_data_parallel_group(with_context_parallel=False),
            counts_here=state.is_pipeline_last_stage(ignore_virtual=True)
            and state.get_tensor_model_parallel_rank() == 0,
            is_first_context_rank=state.get_context_parallel_rank() == 0,
        )


def attention_borders(batch: Batch, window_tokens: int | None) -> tuple[torch.Tensor, int]:
    """Borders that attention does not cross, int32 ``[D + 1]`` on the CPU, and the longest stretch.

    Args:
        batch: A micro-batch.
        window_tokens: Its windows' length where attention reaches over whole windows; None: over documents.
    """
    if window_tokens is None:
        return batch.cu_seqlens, batch.max_seqlen
    return torch.arange(0, batch.tokens.numel() + 1, window_tokens, dtype=torch.int32), window_tokens


class ForwardBackward:
    """Runs global batches through megatron-core's schedules and sums what they measure.

    Args:
        chunks: The model's chunks on this rank, wrapped for data parallelism.
        loss: Weights by class, and the loss's chunk size.
        layout: Where sums stand; its sources name the documents' `Batch.source`.
        device: Where the chunks are.
        window_tokens: Length of a window over all of which attention reaches; None: documents only.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        loss: LossConfig,
        layout: MetricsLayout,
        *,
        device: torch.device,
        window_tokens: int | None = None,
    ) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self._chunks = list(chunks)
        self._device = device
        self._window_tokens = window_tokens
        self._groups = Groups.current()
        self._weights_C = torch.tensor(loss.by_class(), dtype=torch.float64)
        self._weights32_C = self._weights_C.to(device, torch.float32)
        self._sums = torch.zeros(layout.cells, len(QUANTITIES), dtype=torch.float64, device=device)
        self._no_tokens = torch.zeros((), dtype=torch.int)
        self._schedule = get_forward_backward_func()
        self._chunk_size, self._z_loss = loss.chunk_size, loss.z_loss

    def __call__(
        self, batches: Sequence[Batch], *, forward_only: bool = False
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Run one global batch: gradients into the buffers, sums out.

        Args:
            batches: This rank's micro-batches.
            forward_only: Measure, without gradients.

        Returns:
            This rank's sums, float64 ``[S*C, Q]`` on the device, and its extras, both to be added over all
            ranks.
        """
        self._sums.zero_()
        scale = self._loss_scale(batches)
        micro = [self._prepare(batch) for batch in batches]
        iterators = [iter(micro) for _ in self._chunks]
        self._schedule(
            forward_step_func=partial(self._forward_step, scale),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
            num_microbatches=len(micro),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return self._sums.clone(), self._extras(batches)

    def _loss_scale(self, batches: Sequence[Batch]) -> torch.Tensor:
        """One over the global sum of weights, fp32 scalar on the device."""
        counts_C = sum(
            torch.bincount(batch.modality.reshape(-1), minlength=len(CLASSES)) for batch in batches
        )
        total = torch.dot(torch.as_tensor(counts_C).double(), self._weights_C).to(self._device)
        if self._groups.data.size() > 1:
            torch.distributed.all_reduce(total, group=self._groups.data)
        return total.clamp_min(TINY_WEIGHT).reciprocal().float()

    def _prepare(self, batch: Batch) -> MicroBatch:
        """Move to the device, take the context-parallel share, number the cells of the sums."""
        lengths_D = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long()
        source_T = torch.repeat_interleave(batch.source.long().clamp_min(0), lengths_D)
        tensors = {
            "tokens": batch.tokens,
            "labels": batch.labels,
            "classes": batch.modality.long(),
            "cells": (source_T * len(CLASSES))[None] + batch.modality.long(),
        }
        borders, longest = attention_borders(batch, self._window_tokens)
        share = split_batch_for_context_parallel(tensors, borders, self._groups.context)
        share = {name: value.to(self._device, non_blocking=True) for name, value in share.items()}
        packed = packed_sequence_parameters(borders.to(self._device, non_blocking=True), longest)
        return MicroBatch(
            tokens_1L=share["tokens"],
            labels_1L=share["labels"],
            classes_L=share["classes"].reshape(-1),
            cells_L=share["cells"].reshape(-1),
            packed=packed,
            host_cu_seqlens=borders,
        )

    def _forward_step(
        self, scale: torch.Tensor, iterator: Iterator[MicroBatch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, float]]]]:
        batch = next(iterator)
        output = chunk(
            batch.tokens_1L,
            None,
            None,
            packed_seq_params=batch.packed,
            host_cu_seqlens=batch.host_cu_seqlens,
        )
        return output, partial(self._loss, scale, batch, chunk)

    def _loss(
        self, scale: torch.Tensor, batch: MicroBatch, chunk: torch.nn.Module, hidden_L1H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """The micro-batch's part of the loss; megatron-core calls it on the last stage only."""
        weights_L = self._weights32_C[batch.classes_L] * scale
        loss, losses_L, correct_L = unwrap(chunk).weighted_loss(
            hidden_L1H, batch.labels_1L, weights_L, chunk_size=self._chunk_size, z_loss=self._z_loss
        )
        if self._groups.counts_here:
            quantities_LQ = torch.stack(
                [losses_L, correct_L.to(losses_L.dtype), torch.ones_like(losses_L)], dim=1
            )
            self._sums.index_add_(0, batch.cells_L, quantities_LQ.double())
        return loss, self._no_tokens, {}

    def _extras(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Counts that need no model; each window is counted by one rank."""
        if not (self._groups.counts_here and self._groups.is_first_context_rank):
            return {}
        pairs = 0.0
        for batch in batches:
            borders, _ = attention_borders(batch, self._window_tokens)
            lengths = (borders[1:] - borders[:-1]).double()
            pairs += float((lengths * (lengths + 1)).sum()) / 2
        return {
            "padding_tokens": float(sum(batch.padding_tokens for batch in batches)),
            "window_tokens": float(sum(batch.tokens.numel() for batch in batches)),
            "attention_pairs": pairs,
        }
