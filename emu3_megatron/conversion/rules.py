"""Typed rules that turn megatron-core tensors into Hugging Face tensors and back.

A rule names one tensor of ours and the tensors of theirs that hold the same numbers, and tells by `Span`
which rows are which; both directions follow from that. Numbers only move: nothing is added, scaled or
rounded, so a round trip is equal bit by bit. Ours are always the whole tensors (tensor parallelism 1);
distributed checkpoints give them at any layout.

Shape suffixes: V vocabulary rows, H hidden size, F feed-forward size, Q query heads, G query groups,
D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Shape = tuple[int, ...]


class ConversionError(ValueError):
    """Tensors that cannot be converted; the message lists every one of them."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes that decide every tensor's shape; names are megatron-core's."""

    num_layers: int
    """Number of decoder layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the gated MLP (one of gate and up)."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key and value heads."""
    kv_channels: int
    """Size of one head."""
    vocabulary_size: int
    """Ids in use."""
    padded_vocabulary_size: int
    """Rows of our embedding and output layers."""
    qk_layernorm: bool = False
    """RMSNorm on every query and key head (Emu3.5)."""
    qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen2)."""

    def __post_init__(self) -> None:
        """Check that heads divide into groups and that the padded vocabulary holds the vocabulary."""
        if self.num_query_groups < 1 or self.num_attention_heads % self.num_query_groups:
            raise ConversionError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_query_groups={self.num_query_groups}"
            )
        if self.padded_vocabulary_size < self.vocabulary_size:
            raise ConversionError(
                f"padded_vocabulary_size={self.padded_vocabulary_size} is smaller than "
                f"vocabulary_size={self.vocabulary_size}"
            )


@dataclass(frozen=True)
class Span:
    """Consecutive rows that a tensor of theirs and ours have in common."""

    which: int
    """Of their tensors."""
    theirs: int
    """First row in theirs."""
    ours: int
    """First row in ours."""
    rows: int


class Rule(Protocol):
    """One tensor of ours and the tensors of theirs it corresponds to; names may hold ``{layer}``."""

    @property
    def ours(self) -> str:
        """Name in the megatron-core state dict."""

    @property
    def theirs(self) -> tuple[str, ...]:
        """Names in the Hugging Face state dict, in the order of their shapes."""

    @property
    def split_axis(self) -> int | None:
        """Axis of our tensor that tensor parallelism divides; None where every rank holds the whole."""

    @property
    def blocks(self) -> int:
        """Parts of `split_axis` that are divided each on its own."""

    def our_shape(self, sizes: Architecture) -> Shape:
        """Shape of our tensor."""

    def their_shapes(self, sizes: Architecture) -> tuple[Shape, ...]:
        """Shapes of their tensors."""

    def spans(self, sizes: Architecture) -> Iterator[Span]:
        """All rows in use, in the order of ours; rows of ours after them are padding."""


@dataclass(frozen=True)
class Copy:
    """The same tensor under two names. `dims` are names of `Architecture` sizes or products of them."""

    ours: str
    name: str
    dims: tuple[str, ...]
    split_axis: int | None = None
    blocks: int = 1

    @property
    def theirs(self) -> tuple[str, ...]:
        """The one name."""
        return (self.name,)

    def our_shape(self, sizes: Architecture) -> Shape:
        """Sizes looked up by name; ``a*b`` multiplies."""
        return tuple(_dimension(expression, sizes) for expression in self.dims)

    def their_shapes(self, sizes: Architecture) -> tuple[Shape, ...]:
        """As ours."""
        return (self.our_shape(sizes),)

    def spans(self, sizes: Architecture) -> Iterator[Span]:
        """The tensor itself."""
        yield Span(0, 0, 0, self.our_shape(sizes)[0])


@dataclass(frozen=True)
class FusedQKV:
    """Query, key and value projections, fused in megatron-core's order.

    Our rows are, for each query group: its query heads, its key head, its value head
    (``[G, Q/G + 2, D, H]``); theirs are three matrices ``[Q*D, H]``, ``[G*D, H]``, ``[G*D, H]``. Biases are
    laid out as the rows are.
    """

    ours: str
    query: str
    key: str
    value: str
    is_bias: bool = False
    """A vector of biases, not a matrix."""
    split_axis: int | None = 0
    blocks: int = 1

    @property
    def theirs(self) -> tuple[str, ...]:
        """Query, key, value."""
        return (self.query, self.key, self.value)

    def our_shape(self, sizes: Architecture) -> Shape:
        """``[(Q + 2G) * D, H]``, of biases without H."""
        heads = sizes.num_attention_heads + 2 * sizes.num_query_groups
        return (heads * sizes.kv_channels, *self._rest(sizes))

    def their_shapes(self, sizes: Architecture) -> tuple[Shape, ...]:
        """``[Q*D, H]`` and twice ``[G*D, H]``, of biases without H."""
        query = (sizes.num_attention_heads * sizes.kv_channels, *self._rest(sizes))
        key = (sizes.num_query_groups * sizes.kv_channels, *self._rest(sizes))
        return (query, key, key)

    def spans(self, sizes: Architecture) -> Iterator[Span]:
        """Query, key and value rows of every group in turn."""
        key = sizes.kv_channels
        query = sizes.num_attention_heads // sizes.num_query_groups * key
        for group in range(sizes.num_query_groups):
            ours = group * (query + 2 * key)
            yield Span(0, group * query, ours, query)
            yield Span(1, group * key, ours + query, key)
            yield Span(2, group * key, ours + query + key, key)

    def _rest(self, sizes: Architecture) -> Shape:
        """Dimensions after the rows."""
        return () if self.is_bias else (sizes.hidden_size,)


@dataclass(frozen=True)
class GatedMLP:
    """The first matrix of a gated MLP: gate rows, then up rows (``[2F, H]``)."""

    ours: str
    gate: str
    up: str
    split_axis: int | None = 0
    blocks: int = 2

    @property
    def theirs(self) -> tuple[str, ...]:
        """Gate, up."""
        return (self.gate, self.up)

    def our_shape(self, sizes: Architecture) -> Shape:
        """``[2F, H]``."""
        return (2 * sizes.ffn_hidden_size, sizes.hidden_size)

    def their_shapes(self, sizes: Architecture) -> tuple[Shape, ...]:
        """Twice ``[F, H]``."""
        shape = (sizes.ffn_hidden_size, sizes.hidden_size)
        return (shape, shape)

    def spans(self, sizes: Architecture) -> Iterator[Span]:
        """Gate rows, then up rows."""
        for which in range(2):
            yield Span(which, 0, which * sizes.ffn_hidden_size, sizes.ffn_hidden_size)


@dataclass(frozen=True)
class PaddedVocabulary:
    """A matrix with a row per token id: ours is padded, theirs is not.

    The padding rows are dropped on export and are zero on import: no id selects them and their logits are
    never read.
    """

    ours: str
    name: str
    split_axis: int | None = 0
    blocks: int = 1

    @property
    def theirs(self) -> tuple[str, ...]:
        """The one name."""
        return (self.name,)

    def our_shape(self, sizes: Architecture) -> Shape:
        """``[padded V, H]``."""
        return (sizes.padded_vocabulary_size, sizes.hidden_size)

    def their_shapes(self, sizes: Architecture) -> tuple[Shape, ...]:
        """``[V, H]``."""
        return ((sizes.vocabulary_size, sizes.hidden_size),)

    def spans(self, sizes: Architecture) -> Iterator[Span]:
        """The rows in use."""
        yield Span(0, 0, 0, sizes.vocabulary_size)


def joined(rule: Rule, theirs: Sequence[Tensor], sizes: Architecture) -> Iterator[Tensor]:
    """Our tensor from theirs, as runs of rows that follow one another; views but for the padding."""
    end = 0
    for span in rule.spans(sizes):
        yield theirs[span.which][span.theirs : span.theirs + span.rows]
        end = span.ours + span.rows
    rows, *rest = rule.our_shape(sizes)
    if rows > end:
        yield theirs[0].new_zeros(rows - end, *rest)


def separated(rule: Rule, which: int, ours: Tensor, sizes: Architecture) -> Iterator[Tensor]:
    """One of their tensors from ours, as runs of rows that follow one another; views."""
    spans = (span for span in rule.spans(sizes) if span.which == which)
    for span in sorted(spans, key=lambda span: span.theirs):
        yield ours[span.ours : span.ours + span.rows]


def _dimension(expression: str, sizes: Architecture) -> int:
    """The value of ``name`` or ``name*name``."""
    product = 1
    for name in expression.split("*"):
        product *= int(getattr(sizes, name))
    return product
