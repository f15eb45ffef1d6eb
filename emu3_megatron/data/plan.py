"""The plan: an endless list of windows, each a pure function of the plan and its number.

Block ``b`` holds the draws ``b * block_draws`` to ``(b + 1) * block_draws`` of the mixture: from each source
the next documents of its keyed permutation. They are shuffled, packed, and the windows shuffled again, all by
keys derived from the seed. Nothing depends on ranks, workers, batch sizes or restarts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron import _kernels
from emu3_megatron.data.balance import attention_costs
from emu3_megatron.data.block import Block, BlockCache, BlockStore
from emu3_megatron.data.manifest import canonical_sha256
from emu3_megatron.data.mixture import Drawn, Mixture
from emu3_megatron.data.packing import MIN_PIECE, OPEN_WINDOWS, POLICIES, PackedWindows, Policy, pack
from emu3_megatron.data.permutation import derive_key, permute
from emu3_megatron.data.reader import Kind
from emu3_megatron.data.statistics import PlanStatistics, count_windows
from emu3_megatron.data.window import Canvas, Pieces, Segments, Window, cut_windows, lay_segments
from emu3_megatron.errors import UserError

PLAN_VERSION = 1
"""Raised whenever the same settings would give other windows."""

BLOCK_DRAWS = 1 << 16
"""Default documents drawn per block."""

CACHED_BLOCKS = 4
"""Default blocks kept in memory."""

GROUP_TOKENS = 1 << 17
"""Windows of about so many tokens are read together: 4.5 MB."""

SHARE_BITS = 62
"""Draw shares are rounded to multiples of 2^-62 and then counted in exact integers."""


class Plan:
    """An endless list of windows.

    Args:
        mixture: Sources and their weights in tokens.
        seed: Of every shuffle and every decision of a template.
        context_length: Tokens of a window.
        alignment: Every document takes a multiple of this many places; twice the context-parallel degree
            must divide it. 1 pads nothing.
        policy: ``online`` or ``offline``, see `packing.pack`.
        open_windows: Windows that ``online`` keeps open.
        fill: Pour texts into the holes that other documents leave.
        min_piece: Tokens of the smallest piece of a split text.
        block_draws: Documents drawn per block. Larger blocks shuffle better and take longer to build.
        cache: Folder for built blocks, shared by all processes; None keeps them in memory only.
        cached_blocks: Blocks kept in memory.

    Raises:
        UserError: a bad option, or a source of which no document fits a window.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seed: int,
        context_length: int,
        alignment: int = 1,
        policy: Policy = "online",
        open_windows: int = OPEN_WINDOWS,
        fill: bool = False,
        min_piece: int = MIN_PIECE,
        block_draws: int = BLOCK_DRAWS,
        cache: str | os.PathLike[str] | None = None,
        cached_blocks: int = CACHED_BLOCKS,
    ) -> None:
        counts = {
            "context_length": context_length,
            "alignment": alignment,
            "open_windows": open_windows,
            "min_piece": min_piece,
            "block_draws": block_draws,
            "cached_blocks": cached_blocks,
        }
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if context_length % alignment:
            raise UserError(
                f"context_length={context_length} must be a multiple of alignment={alignment} (twice the "
                "context-parallel degree): change one of them"
            )
        if policy not in POLICIES:
            raise UserError(f"policy={policy!r} must be one of {', '.join(POLICIES)}")
        self.mixture, self.seed = mixture, seed
        self.context_length, self.alignment = context_length, alignment
        self.policy: Policy = policy
        self.open_windows, self.fill, self.min_piece = open_windows, fill, min_piece
        self.block_draws = block_draws
        self._shares = [
            round(share * 2**SHARE_BITS)
            for share in mixture.draw_shares(capacity=context_length, cache=cache)
        ]
        blocks = BlockCache(cache, self.fingerprint) if cache is not None else None
        self._store = BlockStore(self._build, blocks, cached_blocks)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the windows, as a JSON object to keep in checkpoints."""
        return {
            "plan version": PLAN_VERSION,
            "seed": self.seed,
            "context_length": self.context_length,
            "alignment": self.alignment,
            "policy": self.policy,
            "open_windows": self.open_windows,
            "fill": self.fill,
            "min_piece": self.min_piece,
            "block_draws": self.block_draws,
            "vocabulary": self.mixture.vocabulary.fingerprint,
            "sources": {
                source.name: {"position": position, **source.identity}
                for position, source in enumerate(self.mixture.sources)
            },
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of `identity`: equal fingerprints mean equal windows."""
        return canonical_sha256(self.identity)

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """Refuse to resume with other data than a checkpoint was trained on.

        Args:
            saved: The `identity` of the plan that the checkpoint was trained with.

        Raises:
            UserError: names everything that changed.
        """
        changes = list(_differences(saved, self.identity))
        if changes:
            raise UserError(
                "the data changed since the checkpoint: "
                + "; ".join(changes)
                + ". Restore it, or start a new "
                "run from the checkpoint's weights"
            )

    def window(self, index: int) -> Window:
        """Window `index` of the plan, from 0; reads its documents.

        Raises:
            UserError: damaged data; names the file.
        """
        return next(self.windows([index]))

    def windows(self, indices: Sequence[int]) -> Iterator[Window]:
        """Windows of these numbers, in this order; reads many at a time, which is faster than one by one.

        Raises:
            UserError: damaged data; names the file.
        """
        group = max(1, GROUP_TOKENS // self.context_length)
        for first in range(0, len(indices), group):
            yield from self.read(indices[first : first + group])

    def read(self, indices: Sequence[int]) -> list[Window]:
        """As `windows`, at once: laid end to end in one canvas, so that few calls read all their documents.

        A plan whose documents become segments by other rules has its own.
        """
        parts = []
        for index in indices:
            block, local = self.locate(index)
            parts.append((block, slice(*block.window_offsets[local : local + 2].tolist())))

        def column(name: str) -> npt.NDArray[Any]:
            return np.concatenate([getattr(block, name)[here] for block, here in parts])

        source = column("source")
        segments = Segments(
            offsets=np.cumsum([0, *(here.stop - here.start for _, here in parts)]),
            source=source,
            document=column("document"),
            start=column("start"),
            length=column("length"),
        )
        at, used = lay_segments(segments, self.context_length, self.alignment)
        pieces = Pieces(
            document=segments.document,
            chosen=column("chosen"),
            caption_after=column("caption_after"),
            caption_tokens=column("caption_tokens"),
            start=segments.start,
            length=segments.length,
            at=at,
        )
        canvas = Canvas(len(indices) * self.context_length, self.mixture.vocabulary.pad)
        for number in np.unique(source).tolist():
            self.mixture.sources[number].write(canvas, pieces.take(source == number), self.mixture.vocabulary)
        return cut_windows(indices, canvas, segments, at, used)

    def block(self, number: int) -> Block:
        """Block `number`, from memory, the cache folder, or built now."""
        return self._store.get(number)

    def windows_before(self, number: int) -> int:
        """Number of the first window of block `number`."""
        return self._store.windows_before(number)

    def build_ahead(self, index: int) -> None:
        """Begin to build, in the background, what will be read from window `index` on."""
        self._store.build_ahead(index)

    def finish_background(self) -> None:
        """Wait for what `build_ahead` began; before this process forks."""
        self._store.finish_background()

    def ranges(self, first: int, last: int) -> Iterator[tuple[Block, int, int]]:
        """The blocks that hold windows ``first`` to ``last - 1``, each with its range: block, from, to."""
        while first < last:
            block, local = self.locate(first)
            count = min(last - first, block.num_windows - local)
            yield block, local, local + count
            first += count

    def costs(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Attention cost of windows ``first`` to ``first + count - 1``, ``[count]``, see `balance`."""
        costs = []
        for block, start, end in self.ranges(first, first + count):
            borders = block.window_offsets[start : end + 1]
            lengths = block.length[borders[0] : borders[-1]].astype(np.int64)
            places = -(-lengths // self.alignment) * self.alignment
            used = np.add.reduceat(places, borders[:-1] - borders[0])
            padding = self.context_length - used
            costs.append(attention_costs(places, borders - borders[0]) + padding * padding)
        return np.concatenate([np.zeros(0, dtype=np.int64), *costs])

    def statistics(self, num_windows: int, start: int = 0) -> PlanStatistics:
        """Count what windows ``start`` to ``start + num_windows - 1`` hold, without reading their tokens."""
        return count_windows(self, num_windows, start)

    def locate(self, index: int) -> tuple[Block, int]:
        """The block that holds window `index`, and the window's place in it."""
        if index < 0:
            raise IndexError(f"window {index}: windows count from 0")
        number, local = self._store.locate(index)
        return self._store.get(number), local

    def draws(self, number: int) -> tuple[npt.NDArray[np.int16], Drawn]:
        """What block `number` is packed from, in its order: source of each draw ``[N]``, and the draws."""
        source, order, drawn = self._ordered_draws(number)
        return source[order], drawn.take(order)

    def _ordered_draws(self, number: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64], Drawn]:
        """Source of each draw, source by source, the order in which they are packed, and the draws."""
        drawn = self._draw(number)
        source = np.repeat(np.arange(len(drawn), dtype=np.int16), [len(each.document) for each in drawn])
        return source, self._shuffled(len(source), "draws", number), Drawn.concatenate(drawn)

    def _draw(self, number: int) -> list[Drawn]:
        """The same by source: the next positions of its stream."""
        drawn = []
        for source, share in zip(self.mixture.sources, self._shares, strict=True):
            first, last = (
                (share * self.block_draws * border) >> SHARE_BITS for border in (number, number + 1)
            )
            drawn.append(source.draw(first, last, seed=self.seed, capacity=self.context_length))
        return drawn

    def pack(self, lengths: npt.NDArray[np.int64], kinds: npt.NDArray[np.int64]) -> PackedWindows:
        """Pack documents in their order, as the plan does with those of a block.

        Args:
            lengths: Tokens of each, ``[N]``.
            kinds: `Kind` of each, ``[N]``.
        """
        return pack(
            lengths,
            self.context_length,
            splittable=kinds == Kind.TEXT,
            align=self.alignment,
            policy=self.policy,
            open_windows=self.open_windows,
            fill=self.fill,
            min_piece=self.min_piece,
        )

    def _build(self, number: int) -> Block:
        """Make block `number`: a pure function of the plan and the number."""
        source, order, drawn = self._ordered_draws(number)
        packed = self.pack(drawn.decided.length[order], drawn.kind[order])
        windows = self._shuffled(packed.num_windows, "windows", number)
        offsets, place, start, length = _kernels.take_windows(
            windows, packed.window_offsets, packed.document, packed.start, packed.length
        )
        owner, dropped = order[place], order[packed.dropped]
        return Block(
            window_offsets=offsets,
            source=source[owner],
            document=drawn.document[owner],
            chosen=drawn.chosen[owner],
            caption_after=drawn.decided.caption_after[owner],
            caption_tokens=drawn.decided.caption_tokens[owner].astype(np.int32),
            start=start,
            length=length,
            dropped_source=source[dropped],
            dropped_document=drawn.document[dropped],
            dropped_length=drawn.decided.length[dropped],
        )

    def _shuffled(self, size: int, purpose: str, number: int) -> npt.NDArray[np.int64]:
        if size == 0:
            return np.zeros(0, dtype=np.int64)
        return permute(np.arange(size), size, derive_key(purpose, self.seed, number))


def _differences(saved: Any, current: Any, path: str = "") -> Iterator[str]:
    """Name the leaves at which two JSON values differ."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in [*saved, *(key for key in current if key not in saved)]:
            where = f"{path}, {key}" if path else str(key)
            if key not in current:
                yield f"{where} is gone"
            elif key not in saved:
                yield f"{where} is new"
            else:
                yield from _differences(saved[key], current[key], where)
    elif saved != current:
        was, now = (str(value)[:16] for value in (saved, current))
        yield f"{path} was {was}, is {now}"
