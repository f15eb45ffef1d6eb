"""Datasets of preference pairs of the tests' small vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from emu3_megatron.data import DatasetWriter
from emu3_megatron.grammar import Image
from emu3_megatron.posttraining.preferences.pairs import PAIR_TASK, pair_segments
from tests.inference.worlds import VOCABULARY, dialect

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Captions, chosen and rejected spans; images of different sizes, since answers may differ in length."""
    rng = np.random.default_rng(seed)
    spans = dialect()
    pairs = []
    for _ in range(count):
        caption = spans.encode_text("".join(chr(code) for code in rng.integers(97, 123, rng.integers(3, 9))))
        images = [
            spans.encode_span(Image(rng.integers(0, VOCABULARY.codebook_size, (rng.integers(2, 5), 3))))
            for _ in range(2)
        ]
        pairs.append((np.asarray(caption), *images))
    return pairs


def write_pairs(folder: Path, pairs: list[Pair], *, shards: int = 1) -> Path:
    with DatasetWriter(folder, "pairs", vocabulary=VOCABULARY, num_shards=shards) as writer:
        for number, (caption, chosen, rejected) in enumerate(pairs):
            segments = pair_segments([(caption, 0)], (chosen, 1), (rejected, 1))
            writer.add_document(segments, f"pair-{number}", PAIR_TASK)
    return folder
