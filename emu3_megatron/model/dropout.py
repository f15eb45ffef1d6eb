"""Dropout whose random numbers belong to tokens and not to ranks.

Whether an activation is dropped is a function of the run's seed, the step, the window and the place of its
token in it, the layer, and the channel (or, in attention, head and key). So a run that goes on under another
layout draws the same masks. megatron-core's dropout draws from a state for each rank.

A mask is one product and one comparison: ``row * column >= limit`` in 32-bit arithmetic that wraps, where
rows are hashed for each token and place in the model, and columns are fixed odd numbers.

Legend: T tokens of this rank, C channels, N heads.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of splitmix64 (Steele, Lea and Flood, 2014)."""


def token_rows(step_key: int, windows: Sequence[int], window_tokens: int) -> torch.Tensor:
    """A random number of every token of a micro-batch.

    Args:
        step_key: Stands for seed and step.
        windows: Numbers of its windows in the plan.
        window_tokens: Length of a window.

    Returns:
        int64 ``[1, windows * window_tokens]`` on the CPU.
    """
    places = np.arange(window_tokens, dtype=np.uint64)
    starts = _mixed(np.asarray(windows, np.uint64) ^ np.uint64(step_key))
    return torch.from_numpy(_mixed(starts[:, None] + places).view(np.int64).reshape(1, -1))


def _mixed(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """splitmix64 of every number."""
    x = x * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def _signed(number: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return number - 2**64 if number >= 2**63 else number


def _columns(count: int, device: torch.device) -> torch.Tensor:
    """Fixed odd numbers, int32 ``[count]``, the first of any longer list."""
    return _listed_columns(1 << max(0, count - 1).bit_length(), device)[:count]


@functools.lru_cache(maxsize=64)
def _listed_columns(count: int, device: torch.device) -> torch.Tensor:
    numbers = (_mixed(np.arange(1, count + 1, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)
    return torch.from_numpy((numbers | np.uint32(1)).view(np.int32)).to(device)


def keep_mask(rows: torch.Tensor, columns: torch.Tensor, probability: float) -> torch.Tensor:
    """bool, True with 1 - `probability`, of the shape that `rows` and `columns` (int32) broadcast to."""
    return rows * columns >= int(probability * 2**32) - 2**31


@dataclass(frozen=True)
class TokenNumbers:
    """Random numbers of the tokens of a micro-batch, see `token_rows`."""

    whole: torch.Tensor
    """int64: of all its tokens."""
    share: torch.Tensor
    """int64 ``[T]``: of those that this rank holds under context parallelism."""


class Place:
    """A place in the model where activations are dropped, such as the output of attention in layer 3.

    Args:
        name: The same for the same place under every layout.
    """

    def __init__(self, name: str) -> None:
        digest = hashlib.sha256(name.encode()).digest()
        self._key = _signed(int.from_bytes(digest[:8], "little"))

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hash `tokens` (int64, see `token_rows`) for this place: odd int32 of the same shape."""
        x = (tokens ^ self._key) * _signed(_FIRST)
        x = (x ^ (x >> 32)) * _signed(_SECOND)
        return (x >> 32).to(torch.int32) | 1


class TokenDropout(torch.nn.Module):
    """Dropout of hidden states ``[T, 1, C]``, alone or with the sum of the residual stream.

    As a module it stands for megatron-core's embedding dropout; called by `add` for its bias-dropout-add.
    Without `tokens` it draws from torch's random state.

    Args:
        place: Name of the place.
        probability: Share that is dropped.
        tensor_group: Group over which tokens are split, under sequence parallelism; else None.
    """

    def __init__(
        self, place: str, probability: float, tensor_group: torch.distributed.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.p = probability
        self.tokens: torch.Tensor | None = None
        """int64 ``[T]`` of the micro-batch at hand, those of the whole tensor-parallel group."""
        self._place = Place(place)
        self._group = tensor_group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` with a share of it dropped and the rest scaled up, in training."""
        if not self.training or self.p == 0.0:
            return x
        if self.tokens is None:
            return F.dropout(x, self.p)
        tokens = self.tokens
        if self._group is not None and self._group.size() > 1:
            tokens = tokens.chunk(self._group.size())[self._group.rank()]
        rows = self._place.rows(tokens)[:, None, None]
        return x * keep_mask(rows, _columns(x.size(-1), x.device), self.p) * (1.0 / (1.0 - self.p))

    def add(self, training: bool, fused: bool) -> Any:
        """In the place of megatron-core's `get_bias_dropout_add`, whose arguments these are."""

        def call(
            x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, _probability: float
        ) -> torch.Tensor:
            x, bias = x_with_bias
            return residual + self(x if bias is None else x + bias)

        return call


class AttentionDropout:
    """Dropout of attention probabilities.

    Args:
        layer: Number of the layer in the whole model.
        probability: Share that is dropped.
    """

    def __init__(self, layer: int, probability: float) -> None:
        self._place, self._heads = Place(f"attention {layer}"), Place(f"heads {layer}")
        self.probability = probability

    def keep(self, queries: torch.Tensor, heads: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Which probabilities are kept.

        Args:
            queries: int64 ``[B, Q]``: random numbers of the tokens that ask.
            heads: int64 ``[N]``: numbers of the heads in the whole model.
            keys: int64 ``[B, K]``: positions in their documents of the tokens that are looked at.

        Returns:
            bool ``[B, N, Q, K]``.
        """
        of_heads = self._heads.rows(heads).long() << 32
        rows = self._place.rows(queries[:, None] ^ of_heads[None, :, None])
        columns = _columns(int(keys.max()) + 1, keys.device)[keys]
        return keep_mask(rows[..., None], columns[:, None, None], self.probability)
