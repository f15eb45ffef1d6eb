"""A megatron-core GPT with a static key-value cache: the forward pass of generation.

The cache is indexed by position: slot ``p`` of a row holds the key and value of that row's token ``p``. Rows
of different lengths therefore need no padding on the left; a row's queries see the slots up to their own
position, and what a shorter row wrote into its padding is overwritten before its queries can see it. One
function serves prefill, decode and runs of forced tokens.

Weights are those of megatron-core's own modules (see `layers`), so tensor parallelism and Transformer Engine
come with them; rotary embedding, cache and attention are here.

Shape suffixes: B rows, N tokens fed per row, S cache slots, H hidden size, Q query heads, G key-value heads
(both of this tensor-parallel rank), R = Q/G, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from emu3_megatron.inference.few_rows import linear
from emu3_megatron.inference.layers import Layer
from emu3_megatron.inference.quantized import Quantized, weight_of

MAX_RUN = 64
"""Most tokens fed to a row in one decode step; also the slack of the cache, see `CachedDecoder`."""

Ranges = tuple[tuple[int, int], ...]
"""Ids to compute logits for: ascending, disjoint, half-open ranges."""


class _Step(NamedTuple):
    """What all layers of one `feed` share."""

    rows: slice
    """Cache rows."""
    limit: int
    """Slots that attention reads."""
    positions: Tensor
    """Of the tokens fed, ``[B, N]``."""
    places: Tensor
    """Where keys and values go: numbers of vectors ``[D]`` in a layer's cache, ``[B * N * 2 * G]``."""
    cosine: Tensor
    """``[B, N, 1, 1, D]``."""
    sine: Tensor
    """Likewise, negative in the first half: see `_rotate`."""
    mask: Tensor | None
    """Added to the scores, ``[B, 1, R * N, S]``."""


class CachedDecoder:
    """Runs a whole (not pipeline-parallel) GPTModel of megatron-core for generation.

    Args:
        model: in evaluation mode.
        max_rows: rows of the cache.
        max_length: most tokens of a row.
        cache_dtype: of keys and values, and so of attention; by default the model's.

    Raises `ValueError` for a model that is cut by pipeline parallelism or built with sequence parallelism.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        max_rows: int,
        max_length: int,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self._model = whole_model(model)
        config = self._model.config
        if config.sequence_parallel:
            raise ValueError(
                "generation needs a model without sequence parallelism; load it with sequence_parallel=False"
            )
        self.max_rows = max_rows
        self.max_length = max_length
        weight = self._model.embedding.word_embeddings.weight
        self.device, self._dtype = weight.device, weight.dtype
        self._logits_dtype = torch.promote_types(self._dtype, torch.float32)
        self._layers = [Layer(layer) for layer in self._model.decoder.layers]
        self._groups, self._size = self._layers[0].groups, int(config.kv_channels)
        self._repeat = self._layers[0].heads // self._groups
        self._scale = self._size**-0.5
        self._slots = max_length + MAX_RUN
        shape = (max_rows, 2, self._groups, self._slots, self._size)
        self._cache = [
            torch.zeros(shape, dtype=cache_dtype or self._dtype, device=self.device) for _ in self._layers
        ]
        self._cosine, self._sine = self._rotary_table(self._slots)
        self._group = self._layers[0].tensor_parallel_group

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
        step = self._step(starts_B, first_row, rows, width)
        embedded_NBH = self._model.embedding(input_ids=tokens_BN, position_ids=step.positions)
        hidden_BNH = embedded_NBH.transpose(0, 1)
        for layer, cache in zip(self._layers, self._cache, strict=True):
            attended = self._attention(layer, layer.attention_norm(hidden_BNH), cache, step)
            hidden_BNH = hidden_BNH + attended
            hidden_BNH = hidden_BNH + layer.feed_forward(hidden_BNH)
        if width > 1:
            last_B = (counts_B.to(self.device) - 1).clamp_min(0)
            hidden_BH = hidden_BNH[torch.arange(rows, device=self.device), last_B]
        else:
            hidden_BH = hidden_BNH[:, 0]
        return self._model.decoder.final_layernorm(hidden_BH[None])[0]

    @torch.no_grad()
    def logits(self, hidden_BH: Tensor, ranges: Ranges) -> Tensor:
        """Logits of the ids in `ranges` only, concatenated in order: ``[B, number of ids]``, fp32 (fp64 of a
        model in fp64).

        Under tensor parallelism every rank gets all of them.
        """
        weight = self._output_weight()
        world = 1 if self._group is None else torch.distributed.get_world_size(self._group)
        if world == 1:
            parts = [_product(hidden_BH, weight[low:high]) for low, high in ranges]
            return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(self._logits_dtype)
        first = torch.distributed.get_rank(self._group) * len(weight)
        total = sum(high - low for low, high in ranges)
        logits = hidden_BH.new_zeros((len(hidden_BH), total), dtype=self._logits_dtype)
        column = 0
        for low, high in ranges:
            mine = range(max(low, first), min(high, first + len(weight)))
            if mine:
                place = column + mine.start - low
                part = _product(hidden_BH, weight[mine.start - first : mine.stop - first])
                logits[:, place : place + len(mine)] = part.to(self._logits_dtype)
            column += high - low
        torch.distributed.all_reduce(logits, group=self._group)
        return logits

    def keep_rows(self, rows: list[int], *, length: int | None = None) -> None:
        """Move the cache of `rows` (ascending) to rows ``0 ..``; the others are free afterwards.

        No row of them holds more than `length` tokens (by default ``max_length``).
        """
        if rows == list(range(len(rows))):
            return
        index = torch.tensor(rows, device=self.device)
        for cache in self._cache:
            used = cache[..., : self._slots if length is None else length, :]
            used[: len(rows)] = used[index]

    def clear(self) -> None:
        """Empty the cache in its place: a NaN in it would reach sums through the mask."""
        for cache in self._cache:
            cache.zero_()

    def _step(self, starts_B: Tensor, first_row: int, rows: int, width: int) -> _Step:
        """Positions, mask and places in the cache of one `feed`."""
        first, last = int(starts_B.min()), int(starts_B.max())
        limit, device = last + width, self.device
        positions_BN = starts_B.to(device)[:, None] + torch.arange(width, device=device)
        mask = None
        if first != last or width > 1:
            ahead = torch.arange(limit, device=device) > positions_BN[:, :, None]
            blocked = torch.zeros(ahead.shape, dtype=self._cache[0].dtype, device=device)
            # the query heads of a key head are further queries of it
            mask = blocked.masked_fill_(ahead, float("-inf")).repeat(1, self._repeat, 1)[:, None]
        heads = torch.arange(2 * self._groups, device=device)
        vectors_B = torch.arange(first_row, first_row + rows, device=device)[:, None, None] * len(heads)
        index_BNG = (vectors_B + heads) * self._slots + positions_BN[:, :, None]
        return _Step(
            slice(first_row, first_row + rows),
            limit,
            positions_BN,
            index_BNG.flatten(),
            self._cosine[positions_BN],
            self._sine[positions_BN],
            mask,
        )

    def _attention(self, layer: Layer, normed_BNH: Tensor, cache: Tensor, step: _Step) -> Tensor:
        """Self-attention of one layer over the cache, new tokens included: ``[B, N, H]``."""
        batch, width, _ = normed_BNH.shape
        mixed = layer.query_key_value(normed_BNH).view(batch, width, self._groups, self._repeat + 2, -1)
        turned = _rotate(layer.normed_heads(mixed[..., :-1, :]), step.cosine, step.sine)
        new = torch.stack([turned[..., -1, :], mixed[..., -1, :]], dim=2)
        cache.view(-1, self._size).index_copy_(0, step.places, new.view(-1, self._size).to(cache.dtype))
        keys_values = cache[step.rows, :, :, : step.limit]
        # the query heads of a group become further queries of its one key head: no copy of keys per head
        query = turned[..., :-1, :].permute(0, 2, 3, 1, 4)
        query = query.reshape(batch, self._groups, self._repeat * width, self._size).to(cache.dtype)
        out = F.scaled_dot_product_attention(
            query, keys_values[:, 0], keys_values[:, 1], attn_mask=step.mask, scale=self._scale
        )
        out = out.view(batch, self._groups, self._repeat, width, self._size).permute(0, 3, 1, 2, 4)
        return layer.attention_output(out.reshape(batch, width, -1).to(normed_BNH.dtype))

    def _rotary_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, ``[length, 1, 1, D]``, computed in fp32 as in training."""
        channels = torch.arange(0, self._size, 2, dtype=torch.float32, device=self.device)
        frequencies = 1.0 / self._model.config.rotary_base ** (channels / self._size)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=self.device), frequencies)
        cosine, sine = angles.cos(), angles.sin()
        tables = torch.cat([cosine, cosine], dim=1), torch.cat([-sine, sine], dim=1)
        return tables[0][:, None, None].to(self._dtype), tables[1][:, None, None].to(self._dtype)

    def _output_weight(self) -> Tensor | Quantized:
        """Rows of the output layer on this rank."""
        if self._model.share_embeddings_and_output_weights:
            return self._model.shared_embedding_or_output_weight()
        return weight_of(self._model.output_layer)


def unwrap(model: torch.nn.Module) -> Any:
    """The GPTModel inside wrappers (data parallelism, half precision), which keep it as ``module``."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def whole_model(model: torch.nn.Module) -> Any:
    """The GPTModel inside wrappers; raises `ValueError` where pipeline parallelism has cut it."""
    whole = unwrap(model)
    if not (whole.pre_process and whole.post_process):
        raise ValueError(
            "generation needs the whole model on every rank; load it with pipeline_model_parallel_size=1"
        )
    return whole


def _product(x: Tensor, weight: Tensor | Quantized) -> Tensor:
    """``x @ weight.T``."""
    return weight.product(x) if isinstance(weight, Quantized) else linear(x, weight)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding, Llama's half rotation, of heads ``[..., D]``; `sine` is first negative."""
    return (x * cosine).addcmul_(x.roll(x.size(-1) // 2, dims=-1), sine)
