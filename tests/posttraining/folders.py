"""Folders of candidates without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from emu3_megatron.grammar import Image
from emu3_megatron.posttraining.preferences.candidates import CandidateFolder, Candidates
from tests.inference.worlds import VOCABULARY, dialect

PROMPTS = ["a cat", "a dog", "", "<img src=x onerror=alert(1)>"]
EACH = 3
IDENTITY = {
    "dialect_name": "emu3",
    "dialect_fingerprint": "d",
    "text_tokenizer_fingerprint": "t",
    "vision_tokenizer_fingerprint": "v",
}


def open_folder(path: Path, **drawing: object) -> CandidateFolder:
    return CandidateFolder.create(
        path, prompts=PROMPTS, vocabulary=VOCABULARY, identity=IDENTITY, drawing={"seed": 0, **drawing}
    )


def candidates_of(number: int) -> tuple[Candidates, list[np.ndarray]]:
    rng = np.random.default_rng(number)
    language = dialect()
    spans = [
        np.asarray(language.encode_span(Image(rng.integers(0, VOCABULARY.codebook_size, (2, 2)))), np.int32)
        for _ in range(EACH)
    ]
    prompt = np.asarray(language.encode_text(PROMPTS[number]), np.int32)
    pictures = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(EACH)]
    return Candidates(prompt, spans, list(range(EACH))), pictures


def filled_folder(path: Path, prompts: int = len(PROMPTS)) -> CandidateFolder:
    folder = open_folder(path)
    for number in range(prompts):
        folder.add(number, *candidates_of(number))
    return folder
