"""Add a dialect: another way to write images and videos as tokens. A dialect is data, not code."""

from __future__ import annotations

import numpy as np

from emu3_megatron.grammar import Dialect, Document, Image, Text, Video
from emu3_megatron.grammar.rules import DialectRules, Field, RowBreak, SpanRule
from emu3_megatron.text.bytes import ByteTokenizer
from emu3_megatron.vocabulary import Vocabulary

# --8<-- [start:dialect]
RULES = DialectRules(
    # BOI "H*W" IMG, rows joined by EOL, EOI: no end of frame, no EOL after the last row.
    image=SpanRule(fields=(Field.HEIGHT, Field.WIDTH), row_break=RowBreak.BETWEEN, frame_break=False),
    # BOI "T*H*W*fps" IMG, frames that each end in EOF, EOI.
    video=SpanRule(
        fields=(Field.FRAMES, Field.HEIGHT, Field.WIDTH, Field.FPS),
        row_break=RowBreak.NEVER,
        frame_break=True,
    ),
)


def round_trip() -> Document:
    """Write a document with both kinds of span, and read it back."""
    text = ByteTokenizer()
    vocabulary = Vocabulary.build("guide", text_size=text.size, codebook_size=64)
    dialect = Dialect("guide", RULES, vocabulary, text)
    document = Document(
        (
            Text("a cat"),
            Image(np.arange(6).reshape(2, 3)),
            Video(np.zeros((2, 2, 2), dtype=np.int64), fps=8.0),
        )
    )
    encoded = dialect.encode(document)
    return dialect.parse(encoded.ids)


# --8<-- [end:dialect]

if __name__ == "__main__":
    print(round_trip())
