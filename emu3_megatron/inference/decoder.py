"""A megatron-core GPT with a static key-value cache: the forward pass of generation.

The cache is indexed by position: slot ``p`` of a row holds the key and value of that row's token ``p``. Rows
of different lengths therefore need no padding on the left; a row's queries see the slots up to their own
position, and what a shorter row wrote into its padding is overwritten before its queries can see it. One
function serves prefill, decode and runs of forced tokens.

Projections, norms and MLP are megatron-core's own modules, called as in training (so tensor parallelism and
Transformer Engine come with them); only rotary embedding, cache and attention are here.

Shape suffixes: B rows, N tokens fed per row, S cache slots, H hidden size, Q query heads, G key-value heads
(both of this tensor-parallel rank), R = Q/G, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

MAX_RUN = 64
"""Most tokens fed to a row in one decode step; also the slack of the cache, see `CachedDecoder`."""

Ranges = tuple[tuple[int, int], ...]
"""Ids to compute logits for: ascending, disjoint, half-open ranges."""


class CachedDecoder:
    """Runs a whole (not pipeline-parallel) GPTModel of megatron-core for generation.

    Raises `ValueError` for a model that is cut by pipeline parallelism or built with sequence parallelism.
    """

    def __init__(self, model: torch.nn.Module, *, max_rows: int, max_length: int) -> None:
        self._model = unwrap(model)
        config = self._model.config
        if not (self._model.pre_process and self._model.post_process):
            raise ValueError(
                "generation needs the whole model on every rank; load it with pipeline_model_parallel_size=1"
            )
        if config.sequence_parallel:
            raise ValueError(
                "generation needs a model without sequence parallelism; load it with sequence_parallel=False"
            )
        self.max_rows = max_rows
        self.max_length = max_length
        weight = self._model.embedding.word_embeddings.weight
        self.device, self._dtype = weight.device, weight.dtype
        self._layers: list[Any] = list(self._model.decoder.layers)
        attention = self._layers[0].self_attention
        self._groups = attention.num_query_groups_per_partition
        self._scale = float(config.kv_channels) ** -0.5
        shape = (max_rows, self._groups, max_length + MAX_RUN, config.kv_channels)
        self._cache = [
            (
                torch.zeros(shape, dtype=self._dtype, device=self.device),
                torch.zeros(shape, dtype=self._dtype, device=self.device),
            )
            for _ in self._layers
        ]
        self._cos, self._sin = self._rotary_table(max_length + MAX_RUN)
        self._group = attention.linear_proj.tp_group if hasattr(attention.linear_proj, "tp_group") else None

    @torch.no_grad()
    def feed(self, tokens_BN: Tensor, starts_B: Tensor, counts_B: Tensor, *, first_row: int = 0) -> Tensor:
        """Append tokens to rows ``first_row ..`` and return the hidden state of each row's last token.

        Args:
            tokens_BN: int64; row ``b`` holds ``counts_B[b]`` tokens, the rest is ignored.
            starts_B: int64, position of each row's first token: how many tokens the row has seen. Its values
                are needed on the host, so give it on the CPU: on a GPU it would stop the queue.
            counts_B: int64, at least 1 where the result is wanted; with 0 the row is left as it was.
            first_row: cache row of ``tokens_BN[0]``.

        Returns:
            ``[B, H]`` after the final norm, in the model's dtype.
        """
        rows, width = tokens_BN.shape
        first, last = int(starts_B.min()), int(starts_B.max())
        uniform, limit = first == last, last + width
        starts_B, counts_B = starts_B.to(self.device), counts_B.to(self.device)
        offsets_N = torch.arange(width, device=self.device)
        positions_BN = starts_B[:, None] + offsets_N
        mask = None
        if not (uniform and width == 1):
            slots_S = torch.arange(limit, device=self.device)
            mask = slots_S[None, None, :] <= positions_BN[:, :, None]
        cos, sin = self._cos[positions_BN], self._sin[positions_BN]
        write = _Write(first_row, rows, positions_BN, first if uniform else None, limit)
        hidden_NBH = self._model.embedding(input_ids=tokens_BN, position_ids=positions_BN)
        for layer, cache in zip(self._layers, self._cache, strict=True):
            normed = layer.input_layernorm(hidden_NBH)
            hidden_NBH = hidden_NBH + self._attention(
                layer.self_attention, normed, cos, sin, cache, write, mask
            )
            hidden_NBH = hidden_NBH + _output(layer.mlp(layer.pre_mlp_layernorm(hidden_NBH)))
        last_B = (counts_B - 1).clamp_min(0)
        hidden_BH = hidden_NBH[last_B, torch.arange(rows, device=self.device)]
        return self._model.decoder.final_layernorm(hidden_BH[None])[0]

    @torch.no_grad()
    def logits(self, hidden_BH: Tensor, ranges: Ranges) -> Tensor:
        """Logits in fp32 of the ids in `ranges` only, concatenated in order (``[B, number of ids]``).

        Under tensor parallelism every rank gets all of them.
        """
        weight = self._output_weight()
        world = 1 if self._group is None else torch.distributed.get_world_size(self._group)
        if world == 1:
            return torch.cat([F.linear(hidden_BH, weight[low:high]) for low, high in ranges], dim=1).float()
        first = torch.distributed.get_rank(self._group) * len(weight)
        total = sum(high - low for low, high in ranges)
        logits = hidden_BH.new_zeros((len(hidden_BH), total), dtype=torch.float32)
        column = 0
        for low, high in ranges:
            mine = range(max(low, first), min(high, first + len(weight)))
            if mine:
                place = column + mine.start - low
                part = F.linear(hidden_BH, weight[mine.start - first : mine.stop - first])
                logits[:, place : place + len(mine)] = part.float()
            column += high - low
        torch.distributed.all_reduce(logits, group=self._group)
        return logits

    def keep_rows(self, rows: list[int]) -> None:
        """Move the cache of `rows` (ascending) to rows ``0 ..``; the others are free afterwards."""
        if rows == list(range(len(rows))):
            return
        index = torch.tensor(rows, device=self.device)
        for key_BGSD, value_BGSD in self._cache:
            key_BGSD[: len(rows)] = key_BGSD[index]
            value_BGSD[: len(rows)] = value_BGSD[index]

    def _attention(
        self,
        attention: Any,
        normed_NBH: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor],
        write: _Write,
        mask_BNS: Tensor | None,
    ) -> Tensor:
        """Self-attention of one layer over the cache, new tokens included: ``[N, B, H]``."""
        query, key, value = attention.get_query_key_value_tensors(normed_NBH, None)[:3]
        query_BNQD = _rotate(query.transpose(0, 1), cos, sin)
        key_BNGD = _rotate(key.transpose(0, 1), cos, sin)
        keys_BGSD, values_BGSD = write.into(cache, key_BNGD, value.transpose(0, 1))
        batch, width, heads, size = query_BNQD.shape
        repeat = heads // self._groups
        # the query heads of a group become further query rows of its one key head: no copy of keys per head
        query = query_BNQD.view(batch, width, self._groups, repeat, size).permute(0, 2, 3, 1, 4)
        query = query.reshape(batch, self._groups, repeat * width, size)
        mask = None if mask_BNS is None else mask_BNS.repeat(1, repeat, 1)[:, None]
        out = F.scaled_dot_product_attention(query, keys_BGSD, values_BGSD, attn_mask=mask, scale=self._scale)
        out = out.view(batch, self._groups, repeat, width, size).permute(3, 0, 1, 2, 4)
        return _output(attention.linear_proj(out.reshape(width, batch, heads * size)))

    def _rotary_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, ``[length, 1, D/2]``, computed in fp32 as in training."""
        config = self._model.config
        channels = torch.arange(0, config.kv_channels, 2, dtype=torch.float32, device=self.device)
        frequencies = 1.0 / config.rotary_base ** (channels / config.kv_channels)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=self.device), frequencies)
        return angles.cos()[:, None].to(self._dtype), angles.sin()[:, None].to(self._dtype)

    def _output_weight(self) -> Tensor:
        """Rows of the output layer on this rank."""
        if self._model.share_embeddings_and_output_weights:
            return self._model.shared_embedding_or_output_weight()
        return self._model.output_layer.weight


class _Write:
    """Where the new keys and values of one `feed` go, and which part of the cache attention reads."""

    def __init__(
        self, first_row: int, rows: int, positions_BN: Tensor, start: int | None, limit: int
    ) -> None:
        self._rows = slice(first_row, first_row + rows)
        self._limit = limit
        self._start = start
        self._positions_BN = positions_BN
        self._index_B1 = torch.arange(rows, device=positions_BN.device)[:, None]

    def into(
        self, cache: tuple[Tensor, Tensor], key_BNGD: Tensor, value_BNGD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write and return the keys and values to attend to, views ``[B, G, limit, D]``."""
        views = []
        for store, new in zip(cache, (key_BNGD, value_BNGD), strict=True):
            rows = store[self._rows]
            if self._start is None:
                rows[self._index_B1, :, self._positions_BN] = new
            else:
                rows[:, :, self._start : self._limit] = new.transpose(1, 2)
            views.append(rows[:, :, : self._limit])
        return views[0], views[1]


def unwrap(model: torch.nn.Module) -> Any:
    """The GPTModel inside wrappers (data parallelism, half precision), which keep it as ``module``."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def _rotate(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, Llama's half rotation; `cos` and `sin` are ``[B, N, 1, D/2]``."""
    first, second = x_BNHD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _output(result: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
    """megatron-core's linear layers and MLP return (output, bias not yet added)."""
    if isinstance(result, Tensor):
        return result
    output, bias = result
    return output if bias is None else output + bias
