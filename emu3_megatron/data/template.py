"""Templates: how a stored document becomes a training sequence.

Datasets hold captions and spans only. BOS and EOS, which of several captions is shown, whether it stands
before or after its span, and whether it is dropped, are decided when a window is planned, by a keyed hash of
the document; so they change without tokenizing again, and are the same for every rank, worker and restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from emu3_megatron.data.format import ALTERNATIVE_MODE, PROMPT_MODE, SPAN_MODE, TEXT_MODE
from emu3_megatron.data.index import Captions, Described
from emu3_megatron.data.permutation import derive_key, uniform
from emu3_megatron.data.reader import Kind
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Modality, span_modality, text_modality
from emu3_megatron.vocabulary import Vocabulary

Segments = Sequence[tuple[npt.NDArray[np.integer[Any]], int]]
Overlong = Literal["drop", "cut_caption"]


def choose_captions(
    documents: npt.NDArray[np.int64], captions: npt.NDArray[np.integer[Any]], *, key: int, epoch: int
) -> Captions:
    """Which of its captions each document shows in an epoch, ``[N]``: a keyed first one, then round in turn.

    So any n epochs in a row show each of a document's n captions once, and every epoch shows all alike.

    Args:
        documents: Numbers of the documents in their dataset, ``[N]``.
        captions: How many each has, ``[N]``; 0 where there is nothing to choose.
        key: Key of the source, for all epochs.
        epoch: Number of the epoch.
    """
    count = np.maximum(captions, 1).astype(np.int64)
    first = (uniform(key, documents) * count).astype(np.int64)
    return ((first + epoch) % count).astype(np.uint8)


def captions_of(segments: Segments) -> int:
    """Number of captions of a document that is a pair, captions and then one span; 0 of any other."""
    modes = [mode for _, mode in segments]
    pair = modes == [TEXT_MODE, *[ALTERNATIVE_MODE] * (len(modes) - 2), SPAN_MODE]
    return len(modes) - 1 if pair else 0


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What a template decided for each document, ``[N]`` each."""

    length: npt.NDArray[np.int64]
    """Tokens of the rendered document."""
    caption_after: npt.NDArray[np.bool_]
    """Pairs: the caption follows its span (image to text) instead of leading it."""
    caption_tokens: npt.NDArray[np.int64]
    """Pairs: tokens of the caption that are kept; 0 where it is dropped."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """How the documents of a source are rendered. Orders other than caption and span stay as stored."""

    caption_after_probability: float = 0.0
    """Share of pairs whose caption follows the span (understanding data; paper section 2.2)."""
    caption_dropout: float = 0.0
    """Share of the pairs with leading caption that lose it, for classifier-free guidance."""
    overlong: Overlong = "drop"
    """A pair longer than the window: `drop` it (counted and named) or `cut_caption` until it fits."""
    bos: bool = True
    """Begin with BOS."""
    eos: bool = True
    """End with EOS."""

    def __post_init__(self) -> None:
        """Check the shares."""
        for name in ("caption_after_probability", "caption_dropout"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise UserError(f"template.{name}={value} must lie between 0 and 1")
        if self.overlong not in ("drop", "cut_caption"):
            raise UserError(f"template.overlong={self.overlong!r} must be 'drop' or 'cut_caption'")

    def decide(
        self,
        documents: npt.NDArray[np.int64],
        described: Described,
        *,
        key: int,
        capacity: int,
    ) -> Decisions:
        """Decide for many documents at once.

        Args:
            documents: Numbers of the documents in their dataset, ``[N]``.
            described: As `MultimodalDataset.describe` gives them, with the captions that are shown.
            key: Key of the source and epoch.
            capacity: Tokens of a window.
        """
        length, caption, kind, _ = described
        pair = kind == Kind.PAIR
        after = pair & (uniform(derive_key("order", key), documents) < self.caption_after_probability)
        dropped = pair & ~after & (uniform(derive_key("dropout", key), documents) < self.caption_dropout)
        kept = np.where(dropped, 0, caption)
        rest = length - caption + self.bos + self.eos
        if self.overlong == "cut_caption":
            kept = np.where(pair, np.minimum(kept, np.maximum(capacity - rest, 0)), kept)
        return Decisions(length=rest + kept, caption_after=after, caption_tokens=kept)

    def expected_tokens(self, described: Described, *, capacity: int) -> npt.NDArray[np.float64]:
        """Mean number of tokens that a draw of each document, as described, adds to the windows, ``[N]``.

        Documents that cannot be split and are longer than a window add none.
        """
        length, caption, kind, _ = described
        rest = length - caption + self.bos + self.eos
        full = rest + caption
        if self.overlong == "cut_caption":
            full = np.where((kind == Kind.PAIR) & (rest <= capacity), np.minimum(full, capacity), full)
        dropping = np.where(
            kind == Kind.PAIR, (1.0 - self.caption_after_probability) * self.caption_dropout, 0.0
        )
        splittable = kind == Kind.TEXT
        with_caption = np.where(splittable | (full <= capacity), full, 0)
        without = np.where(splittable | (rest <= capacity), rest, 0)
        return (1.0 - dropping) * with_caption + dropping * without

    def assemble(
        self,
        segments: Segments,
        vocabulary: Vocabulary,
        *,
        chosen: int = 0,
        caption_after: bool = False,
        caption_tokens: int | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Render a document by decisions taken before: ``(ids int64 [N], modality uint8 [N])``.

        Args:
            segments: ``(ids, mode)`` as stored.
            vocabulary: Gives BOS, EOS and the classes of ids.
            chosen: For a pair, number of the caption to show.
            caption_after: For a pair, put the caption last.
            caption_tokens: For a pair, keep so many tokens of the caption; None keeps all.
        """
        parts = list(segments)
        if captions_of(parts):
            (caption, _), span = parts[:-1][chosen], parts[-1]
            kept = len(caption) if caption_tokens is None else caption_tokens
            text = [(caption[:kept], TEXT_MODE)] if kept else []
            parts = [span, *text] if caption_after else [*text, span]
        talk = any(mode == PROMPT_MODE for _, mode in parts)
        control = np.array([Modality.CONTROL], dtype=np.uint8)
        ids: list[npt.NDArray[Any]] = []
        classes: list[npt.NDArray[np.uint8]] = []
        if self.bos:
            ids.append(np.array([vocabulary.bos]))
            classes.append(control)
        for tokens, mode in parts:
            ids.append(tokens)
            classes.append(
                span_modality(tokens, vocabulary) if mode == SPAN_MODE else text_modality(len(tokens))
            )
            if mode == PROMPT_MODE:
                classes[-1][:] = Modality.PROMPT
            elif talk and mode == TEXT_MODE:  # the end of every answer but the last is stored with it
                classes[-1][tokens == vocabulary.eos] = Modality.CONTROL
        if self.eos:
            ids.append(np.array([vocabulary.eos]))
            classes.append(control)
        return np.concatenate(ids).astype(np.int64, copy=False), np.concatenate(classes)

    def render(
        self, segments: Segments, vocabulary: Vocabulary, rng_key: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Decide by `rng_key` alone and render: ``(ids int64 [N], modality uint8 [N])``."""
        document, captions = np.zeros(1, dtype=np.int64), captions_of(segments)
        chosen = int(choose_captions(document, np.array([captions]), key=rng_key, epoch=0)[0])
        shown = [segments[chosen], segments[-1]] if captions else segments
        length, caption = sum(len(ids) for ids, _ in shown), len(shown[0][0]) if captions else 0
        numbers = (length, caption, Kind.PAIR if captions else Kind.OTHER, captions)
        described = Described(*(np.array([number]) for number in numbers))
        decided = self.decide(document, described, key=rng_key, capacity=2**31)
        return self.assemble(
            segments,
            vocabulary,
            chosen=chosen,
            caption_after=bool(decided.caption_after[0]),
            caption_tokens=int(decided.caption_tokens[0]),
        )
