"""Small documents of every kind, spelled so that a reader can follow them: a byte is a token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.data import DatasetWriter
from emu3_megatron.grammar import Dialect, Image
from emu3_megatron.posttraining.conversation_writer import ConversationWriter
from emu3_megatron.posttraining.conversations import Conversation, Part, Turn
from emu3_megatron.text import CHAT_TEMPLATES
from emu3_megatron.tokenization import Entry
from emu3_megatron.vocabulary import Vocabulary

VOCABULARY = Vocabulary.preset("tiny")
Segments = list[tuple[npt.NDArray[np.int64], int]]

SYMBOLS = {
    VOCABULARY.bos: "^",
    VOCABULARY.eos: "!",
    VOCABULARY.boi: "[",
    VOCABULARY.eoi: "]",
    VOCABULARY.img: "|",
    VOCABULARY.eol: "/",
    VOCABULARY.eof: "$",
    VOCABULARY.pad: "_",
}
"""How control tokens are shown; a vision code is ``v``."""


class ByteTokenizer:
    """One id per byte."""

    size = 256
    fingerprint = "bytes"

    def normalize(self, text: str) -> str:
        return text

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


DIALECT = Dialect.preset("emu3", VOCABULARY, ByteTokenizer())


def image(height: int = 1, width: int = 2, seed: int = 0) -> Image:
    codes = np.random.default_rng(seed).integers(0, VOCABULARY.codebook_size, (height, width))
    return Image(codes)


def text(words: str) -> tuple[npt.NDArray[np.int64], int]:
    return DIALECT.encode_text(words), 0


def span(height: int = 1, width: int = 2, seed: int = 0) -> tuple[npt.NDArray[np.int64], int]:
    return DIALECT.encode_span(image(height, width, seed)), 1


def conversation(
    *turns: tuple[tuple[Part, ...], str],
    system: str | None = None,
    template: str = "emu3-chat",
    height: int = 1,
    width: int = 2,
) -> Segments:
    """Segments of a conversation; images are drawn from their numbers."""
    numbers = [part for question, _ in turns for part in question if isinstance(part, int)]
    entry = Entry(id="x", kind="image", text=None, media=None)
    talk = Conversation(
        id="x",
        place="x:1",
        system=system,
        turns=tuple(Turn(*turn) for turn in turns),
        media=(entry,) * len(numbers),
    )
    images = [image(height, width, seed) for seed in range(len(numbers))]
    return list(ConversationWriter(DIALECT, CHAT_TEMPLATES[template]).segments(talk, images))


def shown(ids: Iterable[int]) -> str:
    """Tokens as one character each."""
    return "".join(SYMBOLS.get(i, chr(i) if i < VOCABULARY.text_size else "v") for i in ids)


def write_dataset(folder: Path, documents: Iterable[Any]) -> Path:
    """A dataset of segments, named by their number."""
    with DatasetWriter(folder, folder.name, vocabulary=VOCABULARY, dialect_name="emu3") as writer:
        for number, segments in enumerate(documents):
            writer.add_document(segments, f"{folder.name}-{number}")
    return folder
