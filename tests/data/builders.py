"""Small datasets in the `tiny` vocabulary, drawn from a seed."""

from __future__ import annotations

import numpy as np

from emu3_megatron.vocabulary import Vocabulary

VOCABULARY = Vocabulary.preset("tiny")


def make_span(rng: np.random.Generator, num_codes: int) -> np.ndarray:
    v = VOCABULARY
    codes = rng.integers(v.vision_offset, v.size, num_codes)
    return np.concatenate([[v.boi, 49, 42, 49, v.img], codes, [v.eol, v.eof, v.eoi]])


def make_text(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(0, VOCABULARY.text_size, length)
