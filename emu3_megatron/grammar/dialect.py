"""One dialect, one vocabulary, one text tokenizer: documents to ids and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.grammar.automaton import Automaton, Ids, State, Unit, as_ids
from emu3_megatron.grammar.document import Codes, Document, Image, Modality, Segment, Text, Video
from emu3_megatron.grammar.meta import spell_characters
from emu3_megatron.grammar.modality import Modalities, span_modality, text_modality
from emu3_megatron.grammar.protocol import TextTokenizer
from emu3_megatron.grammar.rules import DIALECTS, DialectRules
from emu3_megatron.grammar.spans import SpanWriter
from emu3_megatron.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Encoded:
    """A document as ids."""

    ids: Ids
    """int64 ``[N]``, from BOS to EOS."""
    modality: Modalities
    """uint8 ``[N]``: the `Modality` of each id."""


class Dialect:
    """Writes documents as ids, reads them back, and constrains their generation.

    ``parse(encode(document)) == document`` for every canonical document (see `canonical`), and
    ``encode(parse(ids)).ids == ids`` for every sequence that `parse` accepts.

    Args:
        name: Name of the dialect, kept in dataset manifests.
        rules: How spans are written.
        vocabulary: The ids.
        text_tokenizer: Text to ids below ``vocabulary.text_size``.

    Raises:
        ValueError: if the tokenizer has more ids than the vocabulary has for text, or cannot spell sizes.
    """

    def __init__(
        self, name: str, rules: DialectRules, vocabulary: Vocabulary, text_tokenizer: TextTokenizer
    ) -> None:
        if text_tokenizer.size > vocabulary.text_size:
            raise ValueError(
                f"the text tokenizer has {text_tokenizer.size} ids, vocabulary {vocabulary.name!r} only "
                f"{vocabulary.text_size} for text; use Vocabulary.build(..., text_size={text_tokenizer.size})"
            )
        self.name = name
        self.rules = rules
        self.vocabulary = vocabulary
        self.text_tokenizer = text_tokenizer
        self._spelling = spell_characters(text_tokenizer)
        self._spans = SpanWriter(name, rules, vocabulary, spelling=self._spelling)
        self._documents = self.automaton()
        self._single_spans = self.automaton(unit=Unit.SPAN)

    @classmethod
    def preset(cls, name: str, vocabulary: Vocabulary, text_tokenizer: TextTokenizer) -> Dialect:
        """``emu3``, ``emu3-frames`` or ``emu3.5``. Raises `ValueError` for another name."""
        if name not in DIALECTS:
            raise ValueError(f"unknown dialect {name!r}; known dialects: {', '.join(DIALECTS)}")
        return cls(name, DIALECTS[name], vocabulary, text_tokenizer)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the ids of a document: rules, vocabulary, text tokenizer."""
        content = {
            "rules": asdict(self.rules),
            "spelling": self._spelling,
            "vocabulary": self.vocabulary.fingerprint,
            "text_tokenizer": self.text_tokenizer.fingerprint,
        }
        return hashlib.sha256(
            json.dumps(content, sort_keys=True, default=lambda member: member.value).encode()
        ).hexdigest()

    def automaton(self, *, unit: Unit = Unit.DOCUMENT) -> Automaton:
        """The decoding automaton of whole documents (or of single spans)."""
        return Automaton(
            self.rules,
            self.vocabulary,
            spelling=self._spelling,
            text_size=self.text_tokenizer.size,
            unit=unit,
        )

    def canonical(self, document: Document) -> Document:
        """What `document` becomes when it is written and read: ``parse(encode(document).ids)``.

        Texts take the tokenizer's canonical form; frame rates and durations are rounded to three decimals, or
        left out where the dialect does not state them.
        """
        return self.parse(self.encode(document).ids)

    def encode(self, document: Document) -> Encoded:
        """Write a document, from BOS to EOS.

        Raises `ValueError` for a span that cannot be written (see `encode_span`) or text ids out of range.
        """
        ids = [np.array([self.vocabulary.bos])]
        modality = [np.array([Modality.CONTROL], dtype=np.uint8)]
        for segment in document.segments:
            if isinstance(segment, Text):
                ids.append(self.encode_text(segment))
                modality.append(text_modality(len(ids[-1])))
            else:
                ids.append(self.encode_span(segment))
                modality.append(span_modality(ids[-1], self.vocabulary))
        ids.append(np.array([self.vocabulary.eos]))
        modality.append(modality[0])
        return Encoded(np.concatenate(ids), np.concatenate(modality))

    def parse(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> Document:
        """Read a document, from BOS to EOS; the exact inverse of `encode`.

        Raises `GrammarError` at the first id that cannot follow those before it, or, with `incomplete`, at
        the end of a sequence that is a proper prefix of a document.
        """
        array = as_ids(ids)
        self._check(self._documents, array)
        segments: list[Segment] = []
        index = 1
        starts = np.flatnonzero(array == self.vocabulary.boi)
        ends = np.flatnonzero(array == self.vocabulary.eoi) + 1
        for start, end in [*zip(starts.tolist(), ends.tolist(), strict=True), (len(array) - 1, len(array))]:
            if start > index:
                segments.append(self.parse_text(array[index:start]))
            if end < len(array):
                segments.append(self._spans.read(array[start:end]))
            index = end
        return Document(tuple(segments))

    def encode_text(self, text: Text | str) -> Ids:
        """Ids (int64 ``[N]``) of one text segment, all below ``text_tokenizer.size``: no control tokens."""
        text = Text(text) if isinstance(text, str) else text
        ids = as_ids(self.text_tokenizer.encode(text.text) if text.ids is None else text.ids)
        self._check_text_ids(ids)
        return ids

    def encode_texts(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """Ids of many text segments, as `encode_text` gives them but of any integer type."""
        batch = self.text_tokenizer.encode_batch(texts)
        if batch:
            self._check_text_ids(np.concatenate(batch))
        return batch

    def _check_text_ids(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Refuse ids that are none of the text tokenizer's."""
        size = self.text_tokenizer.size
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(f"text ids must lie in [0, {size}), got {int(ids.min())} to {int(ids.max())}")

    def parse_text(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> Text:
        """The text of a run of text ids, with the ids kept where the tokenizer would choose others."""
        own = tuple(as_ids(ids).tolist())
        text = self.text_tokenizer.decode(own)
        return Text(text) if tuple(self.text_tokenizer.encode(text)) == own else Text(text, own)

    def encode_span(self, span: Image | Video) -> Ids:
        """``BOI meta IMG body EOI`` of one image or video, int64 ``[N]``.

        Raises `ValueError` for codes that are not integers of the right shape and range, for a video in a
        dialect that has none, and for a frame rate or duration that the dialect states but the video lacks.
        """
        return self._spans.write(span)

    def parse_span(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> Image | Video:
        """The inverse of `encode_span`. Raises `GrammarError` as `parse` does."""
        array = as_ids(ids)
        self._check(self._single_spans, array)
        return self._spans.read(array)

    def open_span(
        self,
        height: int,
        width: int,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
        codes: Codes | None = None,
    ) -> Ids:
        """The beginning of a span, for a prompt: ``BOI meta IMG``, then the first frames, if any.

        Args:
            height: Rows of vision tokens.
            width: Vision tokens in a row.
            frames: Latent frames that the whole video will have; None for an image.
            fps: Frame rate of the whole video, where the dialect states it.
            seconds: Duration of the whole video, where the dialect states it.
            codes: The first frames of the video, ``[t, H, W]`` with t <= frames.

        Raises:
            ValueError: as `encode_span`, and where `codes` do not fit the stated size.
        """
        if codes is None:
            return self._spans.head(height, width, frames, fps, seconds)[0].copy()
        if frames is None or codes.ndim != 3 or codes.shape[1:] != (height, width) or len(codes) > frames:
            raise ValueError(
                f"the first frames of a video must have shape [t <= frames, height, width] = "
                f"[t <= {frames}, {height}, {width}], got {codes.shape}"
            )
        return self._spans.write_open(Video(codes, fps=fps, seconds=seconds), frames=frames)

    def span_length(
        self,
        height: int,
        width: int,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
    ) -> int:
        """Ids of a span of this size, from BOI to EOI; an image where `frames` is None.

        Raises `ValueError` for a size that cannot be written, and where the dialect states a frame rate or
        duration that is not given.
        """
        head, layout = self._spans.head(height, width, frames, fps, seconds)
        return len(head) + layout.length + 1

    def _check(self, automaton: Automaton, ids: Ids) -> None:
        state: State = automaton.start(ids)
        if not automaton.is_complete(state):
            raise automaton.incomplete(state, len(ids))
