"""Add a source: write a dataset from codes that you already have, and train on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from emu3_megatron.data import ShardWriter, write_manifest
from emu3_megatron.grammar import Dialect, Image
from emu3_megatron.text import TextTokenizer
from emu3_megatron.vocabulary import Vocabulary


# --8<-- [start:source]
def write(
    folder: Path, pairs: list[tuple[str, np.ndarray]], vocabulary: Vocabulary, text: TextTokenizer
) -> None:
    """A dataset of one shard: captions and int64 ``[H, W]`` codes of the vision tokenizer.

    The vocabulary must be that of the other sources of the mixture, and so must both tokenizers.
    """
    dialect = Dialect.preset("emu3", vocabulary, text)
    with ShardWriter(folder, folder.name, vocabulary=vocabulary) as writer:
        for number, (caption, codes) in enumerate(pairs):
            segments = [
                (np.array(text.encode(text.normalize(caption))), 0),
                (dialect.encode_span(Image(codes)), 1),
            ]
            writer.add_document(segments, f"pair-{number}")
    write_manifest(
        folder,
        folder.name,
        1,
        vocabulary=vocabulary,
        dialect_name="emu3",
        dialect_fingerprint=dialect.fingerprint,
        text_tokenizer_fingerprint=text.fingerprint,
        vision_tokenizer_fingerprint="name the tokenizer that made the codes",
        provenance={"maker": "examples/guides/source.py"},
    )


# --8<-- [end:source]
