"""Self-attention over packed windows in plain torch: document masks, context parallelism, KV cache.

Shape legend: T tokens of this rank, B batch (1 in training), N query heads and G key heads of this rank,
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

from emu3_megatron.model.cache import KeyValueCache
from emu3_megatron.model.packing import Group, WindowLayout, gather_rows, scatter_rows


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

    `forward` takes its layout from ``packed_seq_params`` (a `LayoutParameters`) or, in generation, a
    `KeyValueCache` as ``inference_context``.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: object,
        packed_seq_params: Any = None,
        inference_context: Any = None,
        **unused: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention output ``[T, B, hidden]`` and the bias of its projection (None)."""
        query, key, value = self._heads(hidden_states)
        if isinstance(inference_context, KeyValueCache):
            out = self._generate(query, key, value, inference_context)
        else:
            layout: WindowLayout = packed_seq_params.layout
            cosine, sine = rotary_table(
                layout.positions, self.config.kv_channels, self.config.rotary_base, query.dtype, layout.rotary
            )
            query, key = (rotate(x[:, 0], cosine, sine) for x in (query, key))
            value = value[:, 0]
            if self.checkpoint_core_attention and self.training:
                out = tensor_parallel.checkpoint(
                    lambda q, k, v: self.core_attention(q, k, v, layout), False, query, key, value
                )
            else:
                out = self.core_attention(query, key, value, layout)
            out = out.unsqueeze(1)
        output, bias = self.linear_proj(out)
        return output, bias

    def _heads(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query ``[T, B, N, D]``, key and value ``[T, B, G, D]``."""
        mixed, _ = self.linear_qkv(hidden)
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        per_group = self.num_attention_heads_per_partition // groups
        mixed = mixed.view(*mixed.shape[:2], groups, per_group + 2, size)
        query = mixed[..., :per_group, :].reshape(*mixed.shape[:2], groups * per_group, size)
        key, value = mixed[..., per_group, :], mixed[..., per_group + 1, :]
        if self.config.qk_layernorm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value

    def _generate(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: KeyValueCache
    ) -> torch.Tensor:
        """Append to the cache and attend to all of it: ``[T, B, N * D]``."""
        tokens, batch = query.shape[:2]
        cosine, sine = rotary_table(
            cache.positions(tokens).t(), self.config.kv_channels, self.config.rotary_base, query.dtype, {}
        )
        keys, values = cache.append(self.layer_number, rotate(key, cosine, sine), value)
        mask = cache.mask(tokens)
        out = F.scaled_dot_product_attention(
            rotate(query, cosine, sine).permute(1, 2, 0, 3),
            keys,
            values,
            attn_mask=mask,
            scale=self.core_attention.scale,
            enable_gqa=query.size(2) != key.size(2),
        )
        return out.permute(2, 0, 1, 3).reshape(tokens, batch, -1)


def rotary_table(
    positions: torch.Tensor,
    channels: int,
    base: int,
    dtype: torch.dtype,
    known: dict[Any, tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``[*positions, 1, channels / 2]`` of the rotary angles, computed in fp32.

    Args:
        positions: int64, any shape.
        channels: Head size.
        base: Rotary base.
        dtype: Type of the result.
        known: Cache of earlier results for the same positions.
    """
    table = known.get(dtype)
    if table is None:
        exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
        angles = positions.to(torch.float32)[..., None] * (1.0 / (base**exponents))
        table = (angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2))
        known[dtype] = table
    return table


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        cosine, sine = ctx.saved_tensors
        return _turn(gradients[0], cosine, -sine), None, None


def _turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, -1)
    torch.mul(first, cosine, out=out_first).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=out_second).addcmul_(first, sine)
    return out


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions (half rotation, as Llama) to heads ``[*positions, heads, channels]``."""
    return _Rotate.apply(x, cosine, sine)
