"""Preference pairs: two answers to one prompt, as stored tokens, packed into windows side by side.

A pair is one document of an ordinary dataset: the prompt's segments, the chosen answer, the same prompt
again, the rejected answer. A caption and two images of it are so four sequences. Every reader of datasets
reads it; `PairPlan` makes two sequences of it, next to each other in one window and blind to each other, so
that a pair is never parted: not by packing, not over ranks or micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.data import PackedWindows, Plan, Template, Window, pack
from emu3_megatron.data.index import Described
from emu3_megatron.data.mixture import OpenSource
from emu3_megatron.data.template import Decisions, Segments
from emu3_megatron.data.window import WindowBuilder
from emu3_megatron.errors import UserError
from emu3_megatron.grammar.document import Modality
from emu3_megatron.vocabulary import Vocabulary

Ids = npt.NDArray[np.integer[Any]]
Halves = list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]

PAIR_TASK = "preference"
"""Task label of a pair's document."""


def pair_segments(
    prompt: Sequence[tuple[Ids, int]], chosen: tuple[Ids, int], rejected: tuple[Ids, int]
) -> list[tuple[Ids, int]]:
    """A pair as the segments of one document, for `ShardWriter.add_document`.

    Args:
        prompt: ``(ids, mode)`` of what stands before the answer, such as a caption; may be empty.
        chosen: ``(ids, mode)`` of the better answer: an image's whole span, or text.
        rejected: ``(ids, mode)`` of the worse one.
    """
    return [*prompt, chosen, *prompt, rejected]


@dataclass(frozen=True, kw_only=True)
class PairTemplate(Template):
    """Renders a pair as two sequences, BOS and EOS around each. Nothing is dropped or moved."""

    alignment: int = 1
    """That of the plan: both sequences are padded to a multiple of it."""

    def decide(
        self,
        documents: npt.NDArray[np.int64],
        described: Described,
        *,
        key: int,
        capacity: int,
    ) -> Decisions:
        """The room of each pair, `Template.decide`."""
        return Decisions(
            length=self._room(described.length),
            caption_after=np.zeros(len(documents), dtype=np.bool_),
            caption_tokens=np.zeros(len(documents), dtype=np.int64),
        )

    def expected_tokens(self, described: Described, *, capacity: int) -> npt.NDArray[np.float64]:
        """The same, 0 where it is more than a window."""
        room = self._room(described.length)
        return np.where(room <= capacity, room, 0).astype(np.float64)

    def _room(self, length: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Enough for both sequences wherever the border between them falls: once aligned as a whole, this
        covers two that are aligned on their own."""
        return length + 2 * (self.bos + self.eos) + (self.alignment - 1)

    def halves(self, segments: Segments, vocabulary: Vocabulary) -> Halves:
        """Chosen and rejected: ``(ids int64 [N], modality uint8 [N])``; the prompt's classes are PROMPT.

        Raises:
            UserError: the document is not a pair.
        """
        middle = len(segments) // 2
        first, second = segments[:middle], segments[middle:]
        same = [mode for _, mode in first] == [mode for _, mode in second] != [] and all(
            np.array_equal(one, other) for (one, _), (other, _) in zip(first[:-1], second[:-1], strict=True)
        )
        if not same:
            raise UserError(
                "not a preference pair: a pair is stored as prompt, chosen, the same prompt, rejected; make "
                "pairs with tools/make_preferences.py"
            )
        return [self._rendered(half, vocabulary) for half in (first, second)]

    def _rendered(
        self, half: Segments, vocabulary: Vocabulary
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        # As the plan's own rendering of one document; a caption before a span stays before it.
        ids, modality = self.assemble(half, vocabulary)
        prompt = sum(len(part) for part, _ in half[:-1])
        modality[int(self.bos) : int(self.bos) + prompt] = Modality.PROMPT
        return ids, modality


class PairPlan(Plan):
    """A plan of pairs. Segments come in twos: chosen, then rejected, with the number of their document.

    Every source's template must be a `PairTemplate` of the plan's alignment.
    """

    def pack(self, lengths: npt.NDArray[np.int64], kinds: npt.NDArray[np.int64]) -> PackedWindows:
        """Pack pairs whole, those of text too, whatever their kind."""
        return pack(
            lengths,
            self.context_length,
            align=self.alignment,
            policy=self.policy,
            open_windows=self.open_windows,
        )

    def read(self, indices: Sequence[int]) -> list[Window]:
        """Windows of these numbers.

        Raises:
            UserError: damaged data, or a document that is not a pair; names it.
        """
        return [self._pairs_of(index) for index in indices]

    def _pairs_of(self, index: int) -> Window:
        block, local = self.locate(index)
        builder = WindowBuilder(
            index, self.context_length, alignment=self.alignment, pad=self.mixture.vocabulary.pad
        )
        for piece in range(int(block.window_offsets[local]), int(block.window_offsets[local + 1])):
            number, document = int(block.source[piece]), int(block.document[piece])
            for ids, modality in self._halves(self.mixture.sources[number], document):
                builder.add(ids, modality, source=number, document=document, start=0, length=len(ids))
        return builder.finish()

    def _halves(self, source: OpenSource, document: int) -> Halves:
        if not isinstance(source.template, PairTemplate):
            raise UserError(f"source {source.name!r}: a plan of pairs needs a template of pairs")
        try:
            return source.template.halves(source.dataset.document(document), self.mixture.vocabulary)
        except UserError as error:
            raise UserError(f"source {source.name!r}, document {document}: {error}") from error
