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
        sizes = [(group.batch * group.queries, group.batch * group.keys) for group in layout.groups]
        parts = zip(
            layout.groups,
            query.split([q for q, _ in sizes]),
            key.split([k for _, k in sizes]),
            value.split([k for _, k in sizes]),
            strict=True,
        )
        with self._random_state():
            outputs = [self._attend(group, q, k, v) for group, q, k, v in parts]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return scatter_rows(out, layout.query)

    def _attend(
        self, group: Group, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        q = query.view(group.batch, group.queries, *query.shape[1:]).transpose(1, 2)
        k = key.view(group.batch, group.keys, *key.shape[1:]).transpose(1, 2)
        v = value.view(group.batch, group.keys, *value.shape[1:]).transpose(1, 2)
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
