"""Self-attention over packed windows in plain torch: document masks and context parallelism.

Shape legend: T tokens of this rank, N query heads and G key heads of this rank,
M = N / G, D head size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule

from emu3_megatron.model.dropout import AttentionDropout
from emu3_megatron.model.packing import Group, WindowLayout, gather_rows, scatter_rows
from emu3_megatron.model.rotary import RotaryCache, rotary_table, rotate, split_rotated


class PackedAttention(MegatronModule):
    """Scaled dot-product attention inside the documents of a packed window.

    Replaces megatron-core's core attention, which knows neither packed windows nor context parallelism.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: object,
    ) -> None:
        super().__init__(config=config)
        self.cp_group = pg_collection.cp
        self.all_to_all = cp_comm_type == "a2a" and self.cp_group.size() > 1
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = float(config.attention_dropout)
        self.tensor_rank = pg_collection.tp.rank()
        self.token_dropout = AttentionDropout(layer_number, self.dropout)
        self.sequence_parallel = bool(config.sequence_parallel)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: WindowLayout
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: ``[T, N, D]``, rotary positions applied.
            key: ``[T, G, D]``, rotary positions applied.
            value: ``[T, G, D]``.
            layout: The window, see `window_layout`.

        Returns:
            ``[T, N * D]``.
        """
        tokens, heads, size = query.shape
        if self.all_to_all:
            key, value = self._enough_heads(key), self._enough_heads(value)
            query, key, value = (self._tokens_for_heads(x) for x in (query, key, value))
        elif self.cp_group.size() > 1:
            both = gather_from_sequence_parallel_region(torch.cat([key, value], 1), True, self.cp_group)
            key, value = both.split(key.size(1), 1)
        out = self._attend_groups(query, key, value, layout)
        if self.all_to_all:
            out = self._heads_for_tokens(out)
        return out.reshape(tokens, heads * size)

    def _attend_groups(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: WindowLayout
    ) -> torch.Tensor:
        query = gather_rows(query, layout.query)
        key, value = gather_rows(key, layout.key), gather_rows(value, layout.key)
        query_slots = [group.batch * group.queries for group in layout.groups]
        key_slots = [group.batch * group.keys for group in layout.groups]
        groups = list(
            zip(
                layout.groups,
                query.split(query_slots),
                key.split(key_slots),
                value.split(key_slots),
                strict=True,
            )
        )
        # On a CPU: kernels of a GPU draw their own numbers, and without them all probabilities would be held.
        drops_by_token = self.training and self.dropout > 0.0 and not query.is_cuda
        if drops_by_token and layout.tokens is not None:
            numbers = layout.tokens.query_numbers.split(query_slots)
            positions = layout.tokens.key_positions.split(key_slots)
            outputs = [
                self._attend_dropping(*parts, asking, seen)
                for parts, asking, seen in zip(groups, numbers, positions, strict=True)
            ]
        else:
            with self._random_state():
                outputs = [self._attend(*parts) for parts in groups]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return scatter_rows(out, layout.query)

    def _attend(
        self, group: Group, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        q = _by_document(query, group.batch, group.queries)
        k, v = (_by_document(x, group.batch, group.keys) for x in (key, value))
        if query.is_cuda and group.mask is not None:
            # With a mask and fewer key heads CUDA is left with the kernel that holds whole score matrices.
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=group.mask,
            is_causal=group.mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        return out.transpose(1, 2).reshape(group.batch * group.queries, *query.shape[1:])

    def _attend_dropping(
        self,
        group: Group,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        numbers: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """As `_attend`, with probabilities dropped by token.

        Args:
            group: Of documents.
            query: Its query slots.
            key: Its key slots.
            value: The same.
            numbers: Of the tokens that ask, see `SlotTokens`.
            positions: Of those that are looked at.
        """
        q = _by_document(query, group.batch, group.queries)
        repeat = query.size(1) // key.size(1)
        k, v = (_by_document(x, group.batch, group.keys).repeat_interleave(repeat, 1) for x in (key, value))
        scores = (q * self.scale) @ k.transpose(-1, -2)
        mask = group.mask
        if mask is None:
            mask = torch.ones(group.queries, group.keys, dtype=torch.bool, device=q.device).tril()
        probabilities = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
        # Heads are split over tensor parallelism first, then over context parallelism by all-to-all.
        part = self.tensor_rank
        if self.all_to_all:
            part = part * self.cp_group.size() + self.cp_group.rank()
        keep = self.token_dropout.keep(
            numbers.view(group.batch, group.queries),
            torch.arange(part * q.size(1), (part + 1) * q.size(1), device=q.device),
            positions.view(group.batch, group.keys),
        )
        out = (probabilities * keep) @ v * (1.0 / (1.0 - self.dropout))
        return out.transpose(1, 2).reshape(group.batch * group.queries, *query.shape[1:])

    @contextlib.contextmanager
    def _random_state(self) -> Iterator[None]:
        """Draws that differ between tensor-parallel ranks, whose heads differ."""
        if not self.training or self.dropout == 0.0 or self.sequence_parallel:
            yield  # under sequence parallelism the transformer block has already forked the state
        else:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                yield

    def _enough_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Repeat key heads until they divide over the context-parallel ranks."""
        size = self.cp_group.size()
        return x if x.size(1) % size == 0 else x.repeat_interleave(size // math.gcd(x.size(1), size), 1)

    def _tokens_for_heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, n, D]`` -> ``[T * cp, n / cp, D]``, tokens of the ranks one after another."""
        size = self.cp_group.size()
        tokens, heads, channels = x.shape
        x = x.reshape(tokens, size, heads // size, channels).transpose(0, 1)
        return all_to_all(self.cp_group, x.reshape(size * tokens, heads // size, channels))

    def _heads_for_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of `_tokens_for_heads`."""
        size = self.cp_group.size()
        tokens, heads, channels = x.shape
        x = all_to_all(self.cp_group, x.contiguous()).view(size, tokens // size, heads, channels)
        return x.transpose(0, 1).reshape(tokens // size, size * heads, channels)


def _by_document(x: torch.Tensor, batch: int, slots: int) -> torch.Tensor:
    """``[batch * slots, n, D]`` -> ``[batch, n, slots, D]``."""
    return x.view(batch, slots, *x.shape[1:]).transpose(1, 2)


class PackedSelfAttention(SelfAttention):
    """megatron-core's self-attention layer with rotary positions and attention of packed windows.

    `forward` takes its layout from ``packed_seq_params``, a `LayoutParameters`.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: object,
        packed_seq_params: Any = None,
        **unused: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention output ``[T, 1, hidden]`` and the bias of its projection (None)."""
        mixed, _ = self.linear_qkv(hidden_states)
        layout: WindowLayout = packed_seq_params.layout
        mixed = gather_rows(mixed[:, 0], layout.entry)
        query, key, value = self._heads(mixed, layout.positions, layout.rotary)
        if self.checkpoint_core_attention and self.training:
            out = tensor_parallel.checkpoint(
                lambda q, k, v: self.core_attention(q, k, v, layout), False, query, key, value
            )
        else:
            out = self.core_attention(query, key, value, layout)
        output, bias = self.linear_proj(scatter_rows(out, layout.entry).unsqueeze(1))
        return output, bias

    def _heads(
        self, mixed: torch.Tensor, positions: torch.Tensor, known: RotaryCache
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query ``[*positions, N, D]``, key and value ``[*positions, G, D]``, rotary positions applied.

        `mixed` holds, for each key head, its query heads, the key and the value.
        """
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        repeat = self.num_attention_heads_per_partition // groups
        table = rotary_table(
            positions,
            channels=size,
            repeat=repeat,
            base=self.config.rotary_base,
            dtype=mixed.dtype,
            known=known,
        )
        mixed = mixed.view(*mixed.shape[:-1], groups, repeat + 2, size)
        if not self.config.qk_layernorm:
            return split_rotated(mixed, table)
        query, key, value = mixed.split([repeat, 1, 1], -2)
        query, key = self.q_layernorm(query.flatten(-3, -2)), self.k_layernorm(key.squeeze(-2))
        return rotate(query, table), rotate(key, table), value.squeeze(-2)
