"""Rotary positions by gathered tables: one operation for a packed window, whatever its documents.

The half rotation of Llama: channel i of a head turns with channel i + D/2. `rotate_half` is done as a small
matrix product with a signed permutation, which is exact and, on CPU, many times faster than moving runs of
D/2 numbers. Shape legend: R rows (tokens), G key heads, M query heads per key head, D head size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch


class RotaryTable(NamedTuple):
    """Cosine and signless sine ``[*rows, 1, M * D]``, repeated for the M query heads of a key head."""

    cosine: torch.Tensor
    sine: torch.Tensor


RotaryCache = dict[torch.dtype, RotaryTable]
"""Tables of the same positions, by type."""


def rotary_table(
    positions: torch.Tensor, *, channels: int, repeat: int, base: int, dtype: torch.dtype, known: RotaryCache
) -> RotaryTable:
    """Table of `positions`, computed in fp32.

    Args:
        positions: int64, any shape.
        channels: Head size D.
        repeat: Query heads per key head M.
        base: Rotary base.
        dtype: Type of the result.
        known: Earlier tables of the same positions; the result is added.
    """
    table = known.get(dtype)
    if table is None:
        exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
        angles = positions.to(torch.float32)[..., None, None] * (1.0 / (base**exponents))
        copies = (*[1] * (angles.dim() - 1), 2 * repeat)
        table = RotaryTable(angles.cos().to(dtype).repeat(copies), angles.sin().to(dtype).repeat(copies))
        known[dtype] = table
    return table


def rotate(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Turn heads ``[*rows, heads, D]``."""
    size = x.size(-1)
    return _Rotate.apply(x, table.cosine[..., :size], table.sine[..., :size])


def split_rotated(mixed: torch.Tensor, table: RotaryTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the projection ``[*rows, G, M + 2, D]`` and turn query and key.

    Returns:
        Query ``[*rows, G * M, D]``, key and value ``[*rows, G, D]``, contiguous.
    """
    return _SplitRotated.apply(mixed, *table)


@functools.lru_cache(maxsize=8)
def _half_turn_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    half = size // 2
    matrix = torch.zeros(size, size, dtype=dtype)
    index = torch.arange(half)
    matrix[index + half, index] = -1
    matrix[index, index + half] = 1
    return matrix.to(device)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    """``cat(-second half, first half)`` of the last dimension, contiguous."""
    matrix = _half_turn_matrix(x.size(-1), x.dtype, x.device)
    return (x.reshape(-1, x.size(-1)) @ matrix).view(x.shape)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return (x * cosine).addcmul_(_rotate_half(x), sine)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        cosine, sine = ctx.saved_tensors
        (gradient,) = gradients
        return (gradient * cosine).addcmul_(_rotate_half(gradient), sine, value=-1), None, None


class _SplitRotated(torch.autograd.Function):
    """Splits and turns in long runs of memory, and makes no zero-filled gradients of slices."""

    @staticmethod
    def forward(
        ctx: Any, mixed: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cosine, sine)
        size = mixed.size(-1)
        parts = [(mixed.size(-2) - 2) * size, size, size]
        query, key, value = mixed.flatten(-2).split(parts, -1)
        turned_query, turned_key, _ = _rotate_half(mixed).flatten(-2).split(parts, -1)
        query = torch.mul(query, cosine).addcmul_(turned_query, sine)
        key = torch.mul(key, cosine[..., :size]).addcmul_(turned_key, sine[..., :size])
        return query.unflatten(-1, (-1, size)).flatten(-3, -2), key, value.contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (cosine, sine), (query, key, value) = ctx.saved_tensors, gradients
        groups, size = key.shape[-2:]
        per_group = query.size(-2) // groups
        result = query.new_empty((*key.shape[:-1], (per_group + 2) * size))
        into_query, into_key, into_value = result.split([per_group * size, size, size], -1)
        turned_query = _rotate_half(query).unflatten(-2, (groups, per_group)).flatten(-2)
        query = query.unflatten(-2, (groups, per_group)).flatten(-2)
        torch.mul(query, cosine, out=into_query).addcmul_(turned_query, sine, value=-1)
        torch.mul(key, cosine[..., :size], out=into_key).addcmul_(
            _rotate_half(key), sine[..., :size], value=-1
        )
        into_value.copy_(value)
        return result.unflatten(-1, (per_group + 2, size)), None, None
