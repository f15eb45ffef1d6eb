"""How the tokens of a packed window meet in attention: worked out once per micro-batch, used by every layer.

Documents of equal (or nearly equal) length are stacked and attended in one batched causal call: no mask over
the window, no loop over documents. Under context parallelism the two zigzag chunks of each document are
stacked in the same way, their queries against the keys that precede them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from emu3_megatron.model.rotary import RotaryCache
from emu3_megatron.parallel.context import zigzag_indices

_NEARLY_EQUAL_TOKENS = 8
_NEARLY_EQUAL_FRACTION = 0.125
_LONGEST_PADDED = 1024


@dataclass(frozen=True, kw_only=True)
class Group:
    """Documents, or chunks of them, that are attended in one call. Padding slots repeat a real token."""

    batch: int
    """Documents in the group."""
    queries: int
    """Query slots of each."""
    keys: int
    """Key slots of each."""
    mask: torch.Tensor | None
    """bool, True = attend, broadcast to ``[batch, 1, queries, keys]``; None: causal, queries == keys."""


@dataclass(frozen=True, kw_only=True)
class Gather:
    """A selection of rows with padding, and its way back."""

    rows: torch.Tensor | None
    """int64 ``[slots]``: source row of every slot; None: the rows as they are."""
    slots: torch.Tensor | None
    """int64 ``[rows]``: the real slot of every source row; None where a row has several or `rows` is None."""
    padding: torch.Tensor | None
    """int64: slots that repeat a row only to fill a group; None: there are none."""


_IDENTITY = Gather(rows=None, slots=None, padding=None)


@dataclass(frozen=True, kw_only=True)
class SlotTokens:
    """Which tokens stand in the slots of attention."""

    query_numbers: torch.Tensor
    """int64: random number of the token in every query slot."""
    key_positions: torch.Tensor
    """int64: position in its document of the token in every key slot."""


@dataclass(kw_only=True)
class WindowLayout:
    """Index arithmetic of one packed window on one context-parallel rank."""

    groups: list[Group]
    """Attention calls, in the order of the slots."""
    entry: Gather
    """From this rank's tokens to the slots, before anything else, where no collective comes between."""
    query: Gather
    """Inside attention: from the tokens of this rank (`all_gather`) or of the window (`a2a`) to slots."""
    key: Gather
    """The same for keys and values."""
    positions: torch.Tensor
    """int64: position in its document of every token of this rank, after `entry`."""
    rotary: RotaryCache = field(default_factory=dict)
    """Cosine and sine of the positions, filled on first use."""
    tokens: SlotTokens | None = None
    """Where attention is to drop by token."""


class LayoutParameters(PackedSeqParams):
    """megatron-core's packed-sequence parameters with the layout of the window attached."""

    layout: WindowLayout

    @classmethod
    def attach(cls, parameters: PackedSeqParams, layout: WindowLayout) -> LayoutParameters:
        """Copy `parameters` and attach `layout`."""
        result = cls(**vars(parameters))
        result.layout = layout
        return result


def window_layout(
    cu_seqlens: torch.Tensor,
    *,
    cp_size: int,
    cp_rank: int,
    all_to_all: bool,
    device: torch.device,
    numbers: torch.Tensor | None = None,
) -> WindowLayout:
    """Work out the layout of a window.

    Args:
        cu_seqlens: ``[D+1]`` cumulative document lengths of the full window; best on the CPU, else they are
            fetched, which waits for the device.
        cp_size: Context-parallel degree.
        cp_rank: Rank in the context-parallel group.
        all_to_all: Whether attention sees all tokens (and a part of the heads) instead of its own queries.
        device: Where the index tensors live.
        numbers: int64, on that device: random number of every token of the window, for attention dropout.

    Raises:
        LayoutError: a document cannot be split over `cp_size`.
    """
    cu = cu_seqlens.to("cpu", torch.int64).numpy()
    cu = cu[np.concatenate([[True], cu[1:] > cu[:-1]])]  # empty documents have no tokens to attend
    lengths = np.diff(cu)
    held = [zigzag_indices(torch.from_numpy(cu), cp_size, rank).numpy() for rank in range(cp_size)]
    positions = held[cp_rank] - np.repeat(cu[:-1], lengths // cp_size)
    # Row of every window position after the collective (ranks one after another).
    key_rows = np.empty(cu[-1], np.int64)
    key_rows[np.concatenate(held)] = np.arange(cu[-1])
    builder, entry = _Builder(device), _IDENTITY
    if cp_size == 1 or all_to_all:
        for members in _similar(lengths):
            builder.add_causal(cu[:-1][members], lengths[members], key_rows)
        query = key = builder.query_gather(int(cu[-1]))
        if cp_size == 1:
            entry, query, key = query, _IDENTITY, _IDENTITY
            positions = positions if entry.rows is None else positions[builder.query_rows()]
    else:
        query_rows = np.empty(cu[-1], np.int64)
        query_rows[held[cp_rank]] = np.arange(len(held[cp_rank]))
        chunk = lengths // (2 * cp_size)
        for members in _similar(chunk):
            for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
                builder.add_chunk(cu[:-1][members], chunk[members], number, query_rows, key_rows)
        query, key = builder.query_gather(len(held[cp_rank])), builder.key_gather()
    layout = WindowLayout(
        groups=builder.groups, entry=entry, query=query, key=key, positions=_on(device, positions)
    )
    if numbers is not None:
        gathered = np.concatenate(held)  # window position of every row
        asking = gathered if cp_size == 1 or all_to_all else held[cp_rank]
        layout.tokens = _slot_tokens(
            asking[builder.query_rows()], gathered[builder.key_rows()], borders=cu, numbers=numbers
        )
    return layout


def _slot_tokens(
    asking: np.ndarray[Any, Any],
    seen: np.ndarray[Any, Any],
    *,
    borders: np.ndarray[Any, Any],
    numbers: torch.Tensor,
) -> SlotTokens:
    """The tokens at these window positions of the query and key slots; `borders` are those of documents."""
    device = numbers.device
    return SlotTokens(
        query_numbers=numbers[_on(device, asking)],
        key_positions=_on(device, seen - borders[np.searchsorted(borders, seen, side="right") - 1]),
    )


def _similar(lengths: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Indices of documents, grouped so that little padding is needed; groups keep the documents' order."""
    if len(lengths) and int(lengths.min()) == int(lengths.max()):
        return [np.arange(len(lengths))]
    order = np.argsort(-lengths, kind="stable")
    groups, begin = [], 0
    while begin < len(order):
        longest = int(lengths[order[begin]])
        slack = (
            max(_NEARLY_EQUAL_TOKENS, int(longest * _NEARLY_EQUAL_FRACTION))
            if longest <= _LONGEST_PADDED
            else 0
        )
        end = begin + int(np.searchsorted(-lengths[order[begin:]], -(longest - slack), side="right"))
        groups.append(np.sort(order[begin:end]))
        begin = end
    return groups


class _Builder:
    """Collects groups and their slots."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.groups: list[Group] = []
        self._query: list[np.ndarray[Any, Any]] = []
        self._key: list[np.ndarray[Any, Any]] = []
        self._padding: list[np.ndarray[Any, Any]] = []

    def add_causal(
        self, starts: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]
    ) -> None:
        """Whole documents: padding comes after the real tokens, where a causal query never looks."""
        slots, padding = _slots(starts, lengths, int(lengths.max()))
        self._append(rows[slots], rows[slots], padding)
        size = slots.shape[1]
        self.groups.append(Group(batch=len(starts), queries=size, keys=size, mask=None))

    def add_chunk(
        self,
        starts: np.ndarray[Any, Any],
        chunk: np.ndarray[Any, Any],
        number: int,
        query_rows: np.ndarray[Any, Any],
        key_rows: np.ndarray[Any, Any],
    ) -> None:
        """Zigzag chunk `number` of each document against everything up to its end."""
        widest = int(chunk.max())
        queries, padding = _slots(starts + number * chunk, chunk, widest)
        keys, _ = _slots(starts, (number + 1) * chunk, (number + 1) * widest)
        self._append(query_rows[queries], key_rows[keys], padding)
        different = chunk if int(chunk.min()) != widest else chunk[:1]
        position = different[:, None] * number + np.arange(widest)[None]
        mask = np.arange(keys.shape[1])[None, None] <= position[:, :, None]
        self.groups.append(
            Group(
                batch=len(starts),
                queries=widest,
                keys=keys.shape[1],
                mask=_on(self.device, mask[:, None]),
            )
        )

    def _append(
        self, query: np.ndarray[Any, Any], key: np.ndarray[Any, Any], padding: np.ndarray[Any, Any]
    ) -> None:
        self._query.append(query.reshape(-1))
        self._key.append(key.reshape(-1))
        self._padding.append(padding.reshape(-1))

    def query_rows(self) -> np.ndarray[Any, Any]:
        """Source row of every query slot."""
        return np.concatenate(self._query)

    def key_rows(self) -> np.ndarray[Any, Any]:
        """Source row of every key slot."""
        return np.concatenate(self._key)

    def query_gather(self, count: int) -> Gather:
        """The gather of the queries; every one of `count` rows has exactly one real slot."""
        rows, padding = self.query_rows(), np.concatenate(self._padding)
        if len(rows) == count and bool((rows == np.arange(count)).all()):
            return _IDENTITY
        slots = np.empty(count, np.int64)
        slots[rows[~padding]] = np.flatnonzero(~padding)
        return Gather(
            rows=_on(self.device, rows),
            slots=_on(self.device, slots),
            padding=_on(self.device, np.flatnonzero(padding)) if padding.any() else None,
        )

    def key_gather(self) -> Gather:
        """The gather of the keys; a row may have several slots."""
        return Gather(rows=_on(self.device, self.key_rows()), slots=None, padding=None)


def _on(device: torch.device, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The array as a tensor; on its way to a GPU it does not wait for the work that is queued there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _slots(
    starts: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], width: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Window positions ``[D, width]`` of runs, padded with each run's last token, and where padding is."""
    offset = np.arange(width)[None]
    padding = offset >= lengths[:, None]
    return starts[:, None] + np.minimum(offset, lengths[:, None] - 1), padding


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gather: Gather) -> torch.Tensor:
        ctx.gather, ctx.count = gather, x.size(0)
        return x.index_select(0, cast(torch.Tensor, gather.rows))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient, gather = gradients[0], ctx.gather
        if gather.slots is not None:  # padding slots have no gradient: nothing real depends on them
            return gradient.index_select(0, gather.slots), None
        result = gradient.new_zeros((ctx.count, *gradient.shape[1:]))
        return result.index_add_(0, gather.rows, gradient), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gather: Gather) -> torch.Tensor:
        ctx.gather = gather
        return x.index_select(0, cast(torch.Tensor, gather.slots))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gather = ctx.gather
        result = gradients[0].index_select(0, gather.rows)
        if gather.padding is not None:
            result.index_fill_(0, gather.padding, 0)
        return result, None


def gather_rows(x: torch.Tensor, gather: Gather) -> torch.Tensor:
    """Rows of `x` ``[N, ...]`` in slot order."""
    return x if gather.rows is None else _GatherRows.apply(x, gather)


def scatter_rows(x: torch.Tensor, gather: Gather) -> torch.Tensor:
    """Slots of `x` back in row order; padding slots are dropped."""
    return x if gather.rows is None else _ScatterRows.apply(x, gather)
