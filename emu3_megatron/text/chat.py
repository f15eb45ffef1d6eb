"""The prompts of the released models, as document segments.

A template is one string with places for the media and the question. Text is joined before it becomes a
segment, so that whatever no image interrupts is tokenized as one string: pieces tokenized apart would merge
differently. What a user writes is only ever text: ``{`` or ``<|image start|>`` in a question mean themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emu3_megatron.grammar.document import Document, Image, Segment, Text, Video

_PLACE = re.compile(r"\{(media|question)\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A conversation about any number of images or videos.

    Raises `ValueError` unless each of the two places stands in the pattern exactly once, and the pattern
    begins with the opening.
    """

    pattern: str
    """The first turn up to the answer, with the places ``{media}`` and ``{question}``."""
    opening: str = ""
    """What of the pattern is said once, before the first turn; a system message takes its place."""

    def __post_init__(self) -> None:
        """Check the places."""
        if sorted(_PLACE.findall(self.pattern)) != ["media", "question"]:
            raise ValueError(
                f"chat template {self.pattern!r} must hold {{media}} and {{question}}, each exactly once"
            )
        if not self.pattern.startswith(self.opening) or _PLACE.search(self.opening):
            raise ValueError(
                f"chat template {self.pattern!r} must begin with its opening {self.opening!r}, which holds "
                "no place"
            )

    def render(
        self, question: str, media: Iterable[Image | Video] = (), answer: str | None = None
    ) -> Document:
        """The turn as a document; with `answer`, it follows the pattern after one space.

        A prompt for generation is the document's ids without the EOS.
        """
        prompt = self.prompt((Text(question),), tuple(media))
        return Document((*prompt.segments, Text(self.answer(answer)))) if answer is not None else prompt

    def prompt(
        self,
        question: Sequence[Segment],
        media: Sequence[Image | Video] = (),
        *,
        system: str | None = None,
        later: bool = False,
    ) -> Document:
        """What stands before an answer.

        Args:
            question: Text, and images or videos that stand inside it.
            media: Those at the place that the template has for them.
            system: A system message instead of the opening; one space follows it.
            later: This is not the first turn: the opening is left out.
        """
        opening = "" if later else self.opening if system is None else f"{system} "
        pattern = self.pattern.removeprefix(self.opening)
        before, first, between, second, after = _PLACE.split(pattern)
        filling = {"media": tuple(media), "question": tuple(question)}
        return Document(
            (Text(opening + before), *filling[first], Text(between), *filling[second], Text(after))
        )

    @staticmethod
    def answer(text: str) -> str:
        """An answer as it follows the prompt."""
        return f" {text}"


CHAT_TEMPLATES = {
    # github.com/baaivision/Emu3, processing_emu3.py: Emu3-Chat, and the first stage of pre-training
    "emu3-chat": ChatTemplate(
        "You are a helpful assistant. USER: {media}{question}. ASSISTANT:",
        opening="You are a helpful assistant. ",
    ),
    "emu3-stage1": ChatTemplate("{media}{question}"),
}
"""The released templates by name."""
