"""Fixture that writes small datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.data import DatasetWriter
from tests.data.builders import VOCABULARY, make_span, make_text

MakeDataset = Callable[..., Path]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Writes ``tmp_path/NAME``; kinds in turn: p a pair, t a text, i interleaved, v a long pair, c a
    pair of three captions."""

    def make(
        name: str,
        kinds: str = "p",
        documents: int = 40,
        *,
        num_shards: int = 2,
        text: int = 30,
        seed: int = 0,
        **manifest: str,
    ) -> Path:
        rng = np.random.default_rng(seed)
        with DatasetWriter(
            tmp_path / name,
            name,
            vocabulary=VOCABULARY,
            num_shards=num_shards,
            dialect_name="emu3",
            **manifest,
        ) as writer:
            for number in range(documents):
                kind = kinds[number % len(kinds)]
                segments = [(make_text(rng, int(rng.integers(1, text))), 0)]
                if kind == "c":
                    segments += [(make_text(rng, 3), 3), (make_text(rng, 7), 3), (make_span(rng, 5), 1)]
                if kind in "pv":
                    segments.append((make_span(rng, int(rng.integers(4, 20)) if kind == "p" else 500), 1))
                if kind == "i":
                    segments += [(make_span(rng, 5), 1), (make_text(rng, 4), 0), (make_span(rng, 6), 1)]
                writer.add_document(segments, f"{name}-{number}", task=kind)
        return tmp_path / name

    return make
