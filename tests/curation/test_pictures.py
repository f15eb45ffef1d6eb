"""Scores of still pictures."""

from __future__ import annotations

import io
import random

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emu3_megatron.curation.config import QualityConfig
from emu3_megatron.curation.duplicates import HashIndex, picture_hash
from emu3_megatron.curation.image_type import HeuristicClassifier
from emu3_megatron.curation.no_reference import colourfulness, combine, no_reference_parts, piqe
from emu3_megatron.curation.ocr import text_coverage
from emu3_megatron.curation.quality import NoReferenceScorer, make_scorer
from tests.curation import corpus
from tests.curation.corpus import Frames, photograph

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "rocket.jpg", "chelsea.png")


def score(picture: Frames) -> float:
    return combine(no_reference_parts(picture))


def jpeg(picture: Frames, quality: int) -> Frames:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


@pytest.mark.parametrize(
    ("name", "expected"),
    # Of the package pypiqe 1.2 on grey pictures by OpenCV; it needs another build of OpenCV than we do.
    [("astronaut.png", 33.662), ("rocket.jpg", 38.771), ("coffee.png", 27.911), ("moon.png", 36.679)],
)
def test_piqe_agrees_with_another_implementation(name: str, expected: float) -> None:
    assert piqe(cv2.cvtColor(photograph(name), cv2.COLOR_RGB2GRAY)) == pytest.approx(expected, abs=0.7)


def test_piqe_of_a_plain_picture_is_the_worst() -> None:
    assert piqe(np.full((64, 64), 7, np.uint8)) == 100
    assert piqe(np.zeros((5, 3), np.uint8)) == 100


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_damage_lowers_the_score(name: str) -> None:
    picture = photograph(name)
    assert score(picture) > score(jpeg(picture, 15)) > score(cv2.GaussianBlur(picture, (0, 0), 2))
    assert score(cv2.GaussianBlur(picture, (0, 0), 2)) > score(cv2.GaussianBlur(picture, (0, 0), 5))
    threshold = NoReferenceScorer.thresholds["image"]
    assert score(picture) > threshold > score(cv2.GaussianBlur(picture, (0, 0), 3))


def test_the_default_scorer_needs_no_weights() -> None:
    scorer = make_scorer(QualityConfig())
    pictures = [photograph(name) for name in PHOTOGRAPHS]
    assert scorer(pictures) == [scorer([picture])[0] for picture in pictures]


def test_colourfulness() -> None:
    assert colourfulness(np.full((9, 9, 3), 77, np.uint8)) == 0
    assert colourfulness(photograph("camera.png")) < 1 < colourfulness(photograph("astronaut.png"))


def test_text_coverage() -> None:
    page = corpus.text_page()
    assert text_coverage(page) > 0.3
    assert text_coverage(photograph("chelsea.png")) < 0.01
    half = page.copy()
    half[320:] = 255
    assert 0.35 < text_coverage(half) / text_coverage(page) < 0.65


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        *(
            (photograph(name), "photograph")
            for name in (*PHOTOGRAPHS, "retina.jpg", "gravel.png", "camera.png")
        ),
        (corpus.text_page(), "text_page"),
        (photograph("page.png"), "text_page"),
        (corpus.chart(), "chart"),
        (corpus.drawing(), "drawing"),
        (corpus.screenshot(), "screenshot"),
    ],
)
def test_types(picture: Frames, expected: str) -> None:
    result = HeuristicClassifier()(picture)
    assert result["type"] == expected, result


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_hashes_survive_scaling_and_compression(name: str) -> None:
    picture = photograph(name)
    small = cv2.resize(picture, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    others = [picture_hash(photograph(other)) for other in PHOTOGRAPHS if other != name]
    for copy in (small, jpeg(picture, 30)):
        assert (picture_hash(copy) ^ picture_hash(picture)).bit_count() <= 4
        assert all((picture_hash(copy) ^ other).bit_count() > 12 for other in others)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 15), st.integers(0, 2**32))
def test_the_index_finds_what_a_plain_search_finds(distance: int, seed: int) -> None:
    generator = random.Random(seed)
    index, stored = HashIndex(distance), []
    for number in range(60):
        value = generator.getrandbits(64)
        if stored and generator.random() < 0.7:  # near an earlier one
            value = generator.choice(stored)
            for _ in range(generator.randrange(2 * distance + 2)):
                value ^= 1 << generator.randrange(64)
        expected = sorted(
            (d, place) for place, other in enumerate(stored) if (d := (other ^ value).bit_count()) <= distance
        )
        assert [(d, int(name)) for d, name in index.near(value)] == expected
        index.add(value, str(number))
        stored.append(value)
