"""A conversation as the segments of a document: prompts, spans and answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emu3_megatron.data.format import PROMPT_MODE, SPAN_MODE, TEXT_MODE
from emu3_megatron.data.writer import Segment
from emu3_megatron.grammar import Dialect, Image, Text, Video
from emu3_megatron.posttraining.conversations import Conversation, Part
from emu3_megatron.text import ChatTemplate


class ConversationWriter:
    """Writes conversations as segments, by a template and a dialect.

    What a prompt holds is tokenized as the prompt of a generation would be, and an answer apart, as a model
    continues it. EOS follows every answer; the next question begins right behind it (ours: the released
    template has one turn). The last EOS, like BOS, is left to the template of the mixture.
    """

    def __init__(self, dialect: Dialect, template: ChatTemplate) -> None:
        self._dialect, self._template = dialect, template

    def segments(self, conversation: Conversation, spans: Sequence[Image | Video]) -> list[Segment]:
        """The document: ``(ids, mode)`` in order.

        Args:
            conversation: The turns.
            spans: Codes of its media, in the order of `Conversation.media`.

        Raises:
            ValueError: an answer without any token, or a span that the dialect cannot write.
        """
        segments: list[Segment] = []
        eos = np.array([self._dialect.vocabulary.eos])
        for number, turn in enumerate(conversation.turns):
            if number:
                ids, mode = segments[-1]
                segments[-1] = (np.concatenate([ids, eos]), mode)
            media, question = _placed(turn.question)
            prompt = self._template.prompt(
                [Text(part) if isinstance(part, str) else spans[part] for part in question],
                [spans[part] for part in media],
                system=conversation.system,
                later=number > 0,
            )
            for segment in prompt.segments:
                if not isinstance(segment, Text):
                    segments.append((self._dialect.encode_span(segment), SPAN_MODE))
                elif len(words := self._dialect.encode_text(segment)):
                    segments.append((words, PROMPT_MODE))
            answer = self._dialect.encode_text(self._template.answer(turn.answer))
            if not len(answer):
                raise ValueError(f"answer {number + 1} has no text left after normalisation")
            segments.append((answer, TEXT_MODE))
        return segments


def _placed(question: Sequence[Part]) -> tuple[list[int], list[Part]]:
    """Media for the template's place, and the rest of the question.

    A single one goes to the template's place wherever it stands; of several, those that lead.
    """
    media = [part for part in question if isinstance(part, int)]
    if len(media) == 1:
        words = [part.strip() for part in question if isinstance(part, str)]
        return media, [" ".join(words)] if words else []
    leading = next((n for n, part in enumerate(question) if isinstance(part, str)), len(question))
    return media[:leading], list(question[leading:])
