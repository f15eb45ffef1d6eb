"""Small datasets in the `tiny` vocabulary, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emu3_megatron.data.format import INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION
from emu3_megatron.vocabulary import Vocabulary

VOCABULARY = Vocabulary.preset("tiny")


def make_span(rng: np.random.Generator, num_codes: int) -> np.ndarray:
    v = VOCABULARY
    codes = rng.integers(v.vision_offset, v.size, num_codes)
    return np.concatenate([[v.boi, 49, 42, 49, v.img], codes, [v.eol, v.eof, v.eoi]])


def make_text(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(0, VOCABULARY.text_size, length)


def write_stock(prefix: Path, documents: Sequence[Sequence[Sequence[int]]]) -> None:
    """Plain text in Megatron's format, of 16-bit ids: the sequences of each document."""
    sequences = [np.array(ids, dtype="<u2") for document in documents for ids in document]
    lengths = np.array([len(ids) for ids in sequences], dtype="<i4")
    pointers = (np.cumsum(lengths) - lengths).astype("<i8") * 2
    borders = np.cumsum([0, *map(len, documents)]).astype("<i8")
    header = INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, 8, len(lengths), len(borders))
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + borders.tobytes())
    Path(f"{prefix}.bin").write_bytes(b"".join(ids.tobytes() for ids in sequences))
