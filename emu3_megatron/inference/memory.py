"""How many rows of keys and values the memory holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from emu3_megatron.errors import UserError
from emu3_megatron.inference.decoder import MAX_RUN, whole_model

PREFILL_TOKENS = 16_384
"""Most tokens fed in one pass of prefill, over all rows; bounds its memory."""

PREFILL_SCORES = 1 << 28
"""Most pairs of a fed token and a cache slot in one pass: attention holds a mask of them."""

SHARE = 0.9
"""Of the free memory that generation plans with: kernels and allocators take what nobody counts."""

_UNKNOWN = 1 << 62
"""Bytes, for ranks that cannot say."""

_HIDDEN, _FEED_FORWARD = 6, 3
"""How many tensors of either width one layer has in memory at a time."""


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where nobody says (a CPU without ``/proc``).

    On a GPU what torch holds and does not use counts as free; on a CPU the limit of the process's control
    group counts, which is what a cluster's scheduler grants.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [*_available(Path("/proc/meminfo")), *_left_of_groups(Path("/proc/self/cgroup"))]
    return min(found, default=None)


def _available(table: Path) -> Iterator[int]:
    if table.is_file():
        lines = (line.split() for line in table.read_text().splitlines())
        yield from (int(words[1]) * 1024 for words in lines if words and words[0] == "MemAvailable:")


def _left_of_groups(membership: Path, root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What the limit of each control group (version 2) around this process leaves; cached files count as
    free."""
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for line in lines:
        if not line.startswith("0::/"):
            continue
        own = root / line.removeprefix("0::/")
        for group in (own, *own.parents):
            limit = group / "memory.max"
            if limit.is_file() and (most := limit.read_text().strip()) != "max":
                pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
                cached = next((int(value) for name, value in pairs if name == "inactive_file"), 0)
                yield max(0, int(most) - int((group / "memory.current").read_text()) + cached)


class Budget:
    """The memory of a cache for one model, by its shape.

    Args:
        model: the GPTModel, wrapped or not.
        cache_dtype: of keys and values; by default the model's.

    Raises `ValueError` for a model that is cut by pipeline parallelism.
    """

    def __init__(self, model: torch.nn.Module, cache_dtype: torch.dtype | None = None) -> None:
        whole = whole_model(model)
        config, weight = whole.config, whole.embedding.word_embeddings.weight
        attention = whole.decoder.layers[0].self_attention
        self._device = weight.device
        self._layers = len(whole.decoder.layers)
        self._groups = int(attention.num_query_groups_per_partition)
        self._heads = int(attention.num_attention_heads_per_partition)
        self._group: Any = getattr(attention.linear_proj, "tp_group", None)
        self._ranks = 1 if self._group is None else torch.distributed.get_world_size(self._group)
        self._cache_size = (cache_dtype or weight.dtype).itemsize
        self._vector = 2 * self._groups * int(config.kv_channels) * self._cache_size
        widths = _HIDDEN * config.hidden_size + _FEED_FORWARD * config.ffn_hidden_size
        self._token = widths * weight.dtype.itemsize
        self._vocabulary = len(weight) * self._ranks

    def row(self, length: int) -> int:
        """Bytes of keys and values of one row of `length` positions."""
        return self._layers * self._vector * (length + MAX_RUN)

    def whole(self, rows: int, length: int) -> int:
        """Bytes of a cache and of the largest step over it: a prefill, logits, or a layer's moved rows."""
        slots = length + MAX_RUN
        fed = min(rows * slots, max(min(PREFILL_TOKENS, PREFILL_SCORES // slots), rows * MAX_RUN))
        mask = fed * slots * (self._cache_size * (self._heads // self._groups + 1) + 1)
        moved = rows * self._vector * slots
        logits = 4 * rows * self._vocabulary * torch.float32.itemsize
        return rows * self.row(length) + max(fed * self._token + mask, moved, logits)

    def rows(self, wanted: int, least: int, length: int) -> int:
        """At most `wanted` rows, as many as the free memory holds.

        Under tensor parallelism every rank calls it and gets what the smallest of them can.

        Args:
            wanted: Rows that are of use.
            least: Rows that are needed.
            length: Positions of each.

        Raises:
            UserError: not even `least` fit.
        """
        free = self._free()
        fitting = wanted if free is None else self._fitting(wanted, length, int(SHARE * free))
        if free is not None and fitting < least:
            wants, there = self.whole(least, length) / 1e9, free / 1e9
            raise UserError(
                f"{least} rows of {length} positions take {wants:.2f} GB of memory, and {SHARE:.0%} of the "
                f"{there:.2f} GB free on {self._device} may be taken: ask for a smaller --area or fewer "
                "--frames (a server: fewer --rows, a smaller --length), or for --weights int8"
            )
        return fitting

    def _free(self) -> int | None:
        """Bytes that every rank of the tensor-parallel group has."""
        free = free_bytes(self._device)
        if self._ranks == 1:
            return free
        if free is not None and self._device.type == "cpu":
            free //= self._ranks  # they share one memory
        least = torch.tensor(_UNKNOWN if free is None else free, device=self._device)
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=self._group)
        return None if int(least) == _UNKNOWN else int(least)

    def _fitting(self, wanted: int, length: int, memory: int) -> int:
        """The most rows of `wanted` that `memory` holds: more rows never take less."""
        low, high = 0, wanted
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.whole(middle, length) <= memory else (low, middle - 1)
        return low
