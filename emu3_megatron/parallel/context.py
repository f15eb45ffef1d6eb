"""Context parallelism: which tokens of a packed window a rank holds.

Zigzag order, as in megatron-core and Transformer Engine: each *document* is cut into ``2 * size`` equal
chunks and rank r holds chunks r and ``2 * size - 1 - r``, so that every rank has the same causal work.
Documents must therefore be padded to a multiple of ``2 * size`` when windows are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from emu3_megatron.parallel.config import LayoutError

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


def zigzag_indices(cu_seqlens: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """Positions in the full window of the tokens that `rank` holds, in the order it holds them.

    Args:
        cu_seqlens: ``[D+1]`` integer, cumulative document lengths from 0.
        size: Context-parallel degree.
        rank: Rank in the group.

    Returns:
        int64 ``[T / size]`` on the CPU.

    Raises:
        LayoutError: a document is not a multiple of ``2 * size`` long.
    """
    cu = cu_seqlens.to("cpu", torch.int64)
    if size == 1:
        return torch.arange(int(cu[-1]))
    lengths = cu[1:] - cu[:-1]
    if bool((lengths % (2 * size)).any()):
        bad = int(lengths[lengths % (2 * size) != 0][0])
        raise LayoutError(
            f"a document of {bad} tokens cannot be split over context_parallel_size={size}: every "
            f"length must be a multiple of {2 * size}; pack the windows with alignment={2 * size}"
        )
    chunk = lengths // (2 * size)
    document = torch.repeat_interleave(torch.arange(len(lengths)), 2 * chunk)
    within = torch.arange(len(document)) - (cu[:-1] // size)[document]
    second = within >= chunk[document]
    start = torch.where(second, 2 * size - 1 - rank, torch.full_like(within, rank))
    return cu[:-1][document] + start * chunk[document] + within - torch.where(second, chunk[document], 0)


def split_batch_for_context_parallel(
    batch: Mapping[str, torch.Tensor],
    cu_seqlens: torch.Tensor,
    cp_group: torch.distributed.ProcessGroup | None,
) -> dict[str, torch.Tensor]:
    """Take this rank's share of per-token tensors.

    Args:
        batch: Tensors ``[B, T]`` (the second dimension is the packed window).
        cu_seqlens: ``[D+1]`` of the full window.
        cp_group: Context-parallel group; None for a single rank.

    Returns:
        The same names with tensors ``[B, T / size]``.

    Raises:
        LayoutError: a document cannot be split, see `zigzag_indices`.
    """
    if cp_group is None or cp_group.size() == 1:
        return dict(batch)
    indices = zigzag_indices(cu_seqlens, cp_group.size(), cp_group.rank())
    return {name: value.index_select(1, indices.to(value.device)) for name, value in batch.items()}


def packed_sequence_parameters(cu_seqlens: torch.Tensor, max_seqlen: int | None = None) -> PackedSeqParams:
    """megatron-core's description of a packed window.

    Args:
        cu_seqlens: ``[D+1]`` int32, cumulative document lengths of the full (not context-split) window.
        max_seqlen: Longest document; computed when None.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    if max_seqlen is None:
        max_seqlen = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
