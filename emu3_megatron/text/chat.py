"""The prompts of the released models, as document segments.

A template is one string with places for the media and the question. Text is joined before it becomes a
segment, so that whatever no image interrupts is tokenized as one string: pieces tokenized apart would merge
differently. What a user writes is only ever text: ``{`` or ``<|image start|>`` in a question mean themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from emu3_megatron.grammar.document import Document, Image, Text, Video

_PLACE = re.compile(r"\{(media|question)\}")


@dataclass(frozen=True)
class ChatTemplate:
    """One turn: a question about any number of images or videos.

    Raises `ValueError` unless each of the two places stands in the pattern exactly once.
    """

    pattern: str
    """The turn up to the answer, with the places ``{media}`` and ``{question}``."""

    def __post_init__(self) -> None:
        """Check the places."""
        if sorted(_PLACE.findall(self.pattern)) != ["media", "question"]:
            raise ValueError(
                f"chat template {self.pattern!r} must hold {{media}} and {{question}}, each exactly once"
            )

    def render(
        self, question: str, media: Iterable[Image | Video] = (), answer: str | None = None
    ) -> Document:
        """The turn as a document; with `answer`, it follows the pattern after one space.

        A prompt for generation is the document's ids without the EOS.
        """
        before, first, between, second, after = _PLACE.split(self.pattern)
        ending = after if answer is None else f"{after} {answer}"
        filling = {"media": tuple(media), "question": (Text(question),)}
        return Document((Text(before), *filling[first], Text(between), *filling[second], Text(ending)))


CHAT_TEMPLATES = {
    # github.com/baaivision/Emu3, processing_emu3.py: Emu3-Chat, and the first stage of pre-training
    "emu3-chat": ChatTemplate("You are a helpful assistant. USER: {media}{question}. ASSISTANT:"),
    "emu3-stage1": ChatTemplate("{media}{question}"),
}
"""The released templates by name."""
