"""What a stretch of a plan holds, counted from its blocks without reading a token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emu3_megatron.data.block import Block

if TYPE_CHECKING:
    from emu3_megatron.data.plan import Plan

NAMED_DOCUMENTS = 20
"""`PlanStatistics` names at most so many documents of each list."""


@dataclass(frozen=True, kw_only=True)
class PlanStatistics:
    """What a range of windows holds. Token counts include BOS and EOS."""

    windows: int
    """Number of windows."""
    tokens: int
    """Tokens of documents."""
    tokens_per_source: dict[str, int]
    """The same by source."""
    documents_per_source: dict[str, int]
    """Documents begun, by source; those that fit no window do not count."""
    epochs_per_source: dict[str, float]
    """Documents begun over documents of the source: how often it is seen."""
    padding_alignment: int
    """Padding that rounds documents up to the alignment."""
    padding_tail: int
    """Padding at the ends of windows."""
    documents: int
    """Documents and pieces of documents."""
    splits: int
    """Pieces that continue a text begun elsewhere: the number of cuts."""
    dropped: int
    """Documents of the blocks touched that fit no window."""
    dropped_names: list[str]
    """The first of them: source, sample id, tokens."""
    captions_cut: int
    """Pairs whose caption was cut so that they fit a window."""
    captions_cut_names: list[str]
    """The first of them: source, sample id."""

    @property
    def fill(self) -> float:
        """Share of the windows' places that hold tokens of documents."""
        places = self.tokens + self.padding_alignment + self.padding_tail
        return self.tokens / places if places else 0.0


def count_windows(plan: Plan, num_windows: int, start: int) -> PlanStatistics:
    """Count windows ``start`` to ``start + num_windows - 1`` of `plan`; what `Plan.statistics` gives."""
    tokens: Counter[int] = Counter()
    begun: Counter[int] = Counter()
    documents = splits = aligned = dropped = cut = 0
    dropped_names: list[str] = []
    cut_names: list[str] = []
    for block, first, last in plan.ranges(start, start + num_windows):
        pieces = slice(int(block.window_offsets[first]), int(block.window_offsets[last]))
        lengths, source = block.length[pieces].astype(np.int64), block.source[pieces]
        for number in np.unique(source).tolist():
            tokens[number] += int(lengths[source == number].sum())
            begun[number] += int(np.count_nonzero(block.start[pieces][source == number] == 0))
        documents += len(lengths)
        splits += int(np.count_nonzero(block.start[pieces]))
        aligned += int((-(-lengths // plan.alignment) * plan.alignment).sum())
        dropped += len(block.dropped_document)
        dropped_names += _drop_names(plan, block, NAMED_DOCUMENTS - len(dropped_names))
        places = _cut_captions(plan, block, pieces)
        cut += len(places)
        cut_names += [_name(plan, block, place) for place in places[: NAMED_DOCUMENTS - len(cut_names)]]
    total = sum(tokens.values())
    sources = list(enumerate(plan.mixture.sources))
    return PlanStatistics(
        windows=num_windows,
        tokens=total,
        tokens_per_source={source.name: tokens[number] for number, source in sources},
        documents_per_source={source.name: begun[number] for number, source in sources},
        epochs_per_source={source.name: begun[number] / len(source.dataset) for number, source in sources},
        padding_alignment=aligned - total,
        padding_tail=num_windows * plan.context_length - aligned,
        documents=documents,
        splits=splits,
        dropped=dropped,
        dropped_names=dropped_names,
        captions_cut=cut,
        captions_cut_names=cut_names,
    )


def _drop_names(plan: Plan, block: Block, limit: int) -> list[str]:
    columns = (block.dropped_source, block.dropped_document, block.dropped_length)
    names = []
    for number, document, length in list(zip(*columns, strict=True))[: max(0, limit)]:
        source = plan.mixture.sources[int(number)]
        names.append(f"{source.name}: {source.dataset.sample_id(int(document))} ({length} tokens)")
    return names


def _cut_captions(plan: Plan, block: Block, pieces: slice) -> list[int]:
    """Pieces of the block that are pairs with a shortened caption: such a pair fills its window exactly."""
    cut: list[int] = []
    for number, source in enumerate(plan.mixture.sources):
        if source.template.overlong != "cut_caption":
            continue
        full = (block.source[pieces] == number) & (block.length[pieces] == plan.context_length)
        places = np.flatnonzero(full & (block.start[pieces] == 0)) + pieces.start
        described = source.dataset.describe(block.document[places], block.chosen[places])
        cut += places[block.caption_tokens[places] < described.caption].tolist()
    return sorted(cut)


def _name(plan: Plan, block: Block, piece: int) -> str:
    source = plan.mixture.sources[int(block.source[piece])]
    return f"{source.name}: {source.dataset.sample_id(int(block.document[piece]))}"
