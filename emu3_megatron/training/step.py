"""One step's forward and backward pass, and the sums of what it measures.

The loss is an objective's, which divides by denominators that are known before the first forward pass and
added up over data-parallel ranks in float64; so gradients are right whatever the layout, the number of
micro-batches, or how unevenly targets fall on ranks, and a rank without any target is harmless.

Legend: T tokens of a micro-batch (all its windows joined), L this rank's share under context parallelism,
S sources, C classes, Q quantities of a cell, E quantities and N denominators of the objective, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from emu3_megatron.data.loader import Batch
from emu3_megatron.model.dropout import TokenNumbers, token_rows
from emu3_megatron.parallel.context import packed_sequence_parameters, split_batch_for_context_parallel
from emu3_megatron.training.metrics import QUANTITIES, MetricsLayout, cells_of
from emu3_megatron.training.modules import unwrap
from emu3_megatron.training.objective import MicroBatch, Objective, Prepared

TINY_WEIGHT = 1e-30
"""Stands in for a global denominator of zero: the step then has a loss and gradients of zero."""


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
        objective: What turns token losses into one loss.
        layout: Where sums stand; its sources name the documents' `Batch.source`.
        device: Where the chunks are.
        window_tokens: Length of a window over all of which attention reaches; None: documents only.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        objective: Objective,
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
        self._objective = objective
        self._sums = torch.zeros(layout.cells, len(QUANTITIES), dtype=torch.float64, device=device)
        self._own_sums = torch.zeros(len(layout.quantities), dtype=torch.float64, device=device)
        self._no_tokens = torch.zeros((), dtype=torch.int)
        self._schedule = get_forward_backward_func()

    def __call__(
        self, batches: Sequence[Batch], *, forward_only: bool = False, dropout_key: int | None = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Run one global batch: gradients into the buffers, sums out.

        Args:
            batches: This rank's micro-batches.
            forward_only: Measure, without gradients.
            dropout_key: What dropout is drawn from, with window, token and place; None: no dropout.

        Returns:
            This rank's sums, float64 ``[S*C*Q + E]`` on the device, and its extras, both to be added over all
            ranks.
        """
        self._sums.zero_()
        self._own_sums.zero_()
        scales = self._scales(batches)
        prepared = self._objective.prepare(batches)
        micro = [self._placed(*pair, dropout_key) for pair in zip(batches, prepared, strict=True)]
        iterators = [iter(micro) for _ in self._chunks]
        self._schedule(
            forward_step_func=partial(self._forward_step, scales),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
            num_microbatches=len(micro),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return torch.cat([self._sums.reshape(-1), self._own_sums]), self._extras(batches)

    def _scales(self, batches: Sequence[Batch]) -> torch.Tensor:
        """One over each global denominator, fp32 ``[N]`` on the device."""
        totals_N = self._objective.denominators(batches).to(self._device)
        if self._groups.data.size() > 1:
            torch.distributed.all_reduce(totals_N, group=self._groups.data)
        return totals_N.clamp_min(TINY_WEIGHT).reciprocal().float()

    def _placed(self, batch: Batch, prepared: Prepared, dropout_key: int | None) -> MicroBatch:
        """Take the context-parallel share, move to the device."""
        numbers = {}
        if dropout_key is not None:
            window_tokens = batch.tokens.numel() // len(batch.windows)
            numbers["dropout"] = token_rows(dropout_key, batch.windows, window_tokens)
        tensors = {
            "tokens": batch.tokens,
            "labels": batch.labels,
            "cells": cells_of(batch, prepared.classes),
        }
        own = {f"prepared {name}": value for name, value in prepared.tokens.items()}
        borders, longest = attention_borders(batch, self._window_tokens)
        share = split_batch_for_context_parallel(tensors | own | numbers, borders, self._groups.context)
        share = {name: value.to(self._device, non_blocking=True) for name, value in share.items()}
        packed = packed_sequence_parameters(borders.to(self._device, non_blocking=True), longest)
        return MicroBatch(
            tokens_1L=share["tokens"],
            labels_1L=share["labels"],
            cells_L=share["cells"].reshape(-1),
            packed=packed,
            host_cu_seqlens=borders,
            dropout=TokenNumbers(
                numbers["dropout"].reshape(-1).to(self._device), share["dropout"].reshape(-1)
            )
            if numbers
            else None,
            prepared_L={name: share[f"prepared {name}"].reshape(-1) for name in prepared.tokens},
            whole={name: value.to(self._device) for name, value in prepared.whole.items()},
        )

    def _forward_step(
        self, scales: torch.Tensor, iterator: Iterator[MicroBatch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, float]]]]:
        batch = next(iterator)
        output = chunk(
            batch.tokens_1L,
            None,
            None,
            packed_seq_params=batch.packed,
            host_cu_seqlens=batch.host_cu_seqlens,
            dropout=batch.dropout,
        )
        return output, partial(self._loss, scales, batch, chunk)

    def _loss(
        self, scales: torch.Tensor, batch: MicroBatch, chunk: torch.nn.Module, hidden_L1H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """The micro-batch's part of the loss; megatron-core calls it on the last stage only."""
        loss = self._objective.loss(unwrap(chunk), hidden_L1H, batch, scales)
        if self._groups.counts_here:
            quantities_LQ = torch.stack(
                [loss.losses_L, loss.correct_L.to(loss.losses_L.dtype), torch.ones_like(loss.losses_L)], dim=1
            )
            self._sums.index_add_(0, batch.cells_L, quantities_LQ.double())
            if loss.quantities_E is not None:
                self._own_sums += loss.quantities_E
        return loss.total, self._no_tokens, {}

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
