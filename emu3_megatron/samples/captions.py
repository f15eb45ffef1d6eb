"""Captions of scenes in English and Chinese, and reading attributes back from a caption.

Chinese wordings separate attributes by punctuation: a text tokenizer that joins frequent neighbours then
keeps one piece to an attribute, as spaces do for it in English.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from emu3_megatron.samples.definitions import BACKGROUNDS, COLOURS, DIRECTIONS, POSITIONS, SHAPES, SIZES
from emu3_megatron.samples.world import Scene

LANGUAGES = ("en", "zh")

_ENGLISH_DIRECTIONS = {name: f"moving {name}" for name in DIRECTIONS}

WORDS: Mapping[str, Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "en": {
            "shape": {name: name for name in SHAPES},
            "colour": {name: name for name in COLOURS},
            "size": {name: name for name in SIZES},
            "background": {name: f"{name} background" for name in BACKGROUNDS},
            "position": {name: name for name in POSITIONS},
            "direction": _ENGLISH_DIRECTIONS,
        },
        "zh": {
            "shape": dict(zip(SHAPES, ("圆形", "方形", "三角形", "圆环", "十字", "菱形"), strict=True)),
            "colour": dict(
                zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "紫色", "橙色", "青色", "粉色"), strict=True)
            ),
            "size": dict(zip(SIZES, ("小号", "中号", "大号"), strict=True)),
            "background": dict(
                zip(BACKGROUNDS, ("白色背景", "黑色背景", "灰色背景", "棕色背景"), strict=True)
            ),
            "position": dict(
                zip(
                    POSITIONS,
                    ("左上", "上方", "右上", "左侧", "中央", "右侧", "左下", "下方", "右下"),
                    strict=True,
                )
            ),
            "direction": dict(zip(DIRECTIONS, ("向左", "向右", "向上", "向下"), strict=True)),
        },
    }
)
"""The phrase of every attribute's every value in each language."""

WORDINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "en": (
            "{size} {colour} {shape}, {place}, {background}",
            "a {size} {colour} {shape}, {place}, on a {background}",
            "{colour} {shape}, {size}, {place}, {background}",
        ),
        "zh": (
            "{size}、{colour}、{shape},{place},{background}",
            "{colour}、{shape},{size},{place},{background}",
            "一个{size}、{colour}、{shape},{place},{background}",
        ),
    }
)
"""Wordings of each language; ``{place}`` is the position of a still and the direction of a clip."""


def caption(scene: Scene, *, language: str = "en", wording: int = 0) -> str:
    """Name every attribute of a scene.

    Args:
        scene: a still or a clip.
        language: ``en`` or ``zh``.
        wording: index into ``WORDINGS[language]``.

    Raises:
        ValueError: the language or wording is unknown.
    """
    if language not in WORDS or not 0 <= wording < len(WORDINGS[language]):
        known = ", ".join(f"{name}: 0..{len(texts) - 1}" for name, texts in WORDINGS.items())
        raise ValueError(f"no wording {wording} of language {language!r}; known wordings: {known}")
    words = WORDS[language]
    place = words["position"][scene.position] if scene.position else words["direction"][str(scene.direction)]
    return WORDINGS[language][wording].format(
        size=words["size"][scene.size],
        colour=words["colour"][scene.colour],
        shape=words["shape"][scene.shape],
        background=words["background"][scene.background],
        place=place,
    )


def _pattern(language: str, attribute: str) -> re.Pattern[str]:
    """Matches any phrase of an attribute; the longest first, since some begin with others."""
    phrases = sorted(WORDS[language][attribute].values(), key=len, reverse=True)
    alternatives = "|".join(re.escape(phrase).replace(r"\ ", r"\s+") for phrase in phrases)
    return re.compile(rf"\b(?:{alternatives})\b" if language == "en" else f"(?:{alternatives})")


_PATTERNS = {(lang, key): _pattern(lang, key) for lang, table in WORDS.items() for key in table}
_NAMES = {
    (lang, key): {phrase: name for name, phrase in phrases.items()}
    for lang, table in WORDS.items()
    for key, phrases in table.items()
}


def parse_caption(text: str) -> dict[str, str]:
    """Read the attributes that a caption states, in either language.

    Returns:
        Values by the attribute names of `Scene`. An attribute that is missing, or named twice with
        different values, is left out: it is not guessed.
    """
    language = "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"
    rest, found = text.lower(), {}
    # Backgrounds and directions first, taken out of the text: their phrases hold words of other attributes.
    for attribute in ("background", "direction", "position", "size", "colour", "shape"):
        pattern = _PATTERNS[language, attribute]
        phrases = {re.sub(r"\s+", " ", match) for match in pattern.findall(rest)}
        rest = pattern.sub(" . ", rest)
        if len(phrases) == 1:
            found[attribute] = _NAMES[language, attribute][phrases.pop()]
    return found


def text_document(rng: np.random.Generator, *, language: str, sentences: int = 4) -> str:
    """A pure text document: short true sentences in the world's words.

    It never names a shape, a colour and a place together, so it cannot state a held-out combination.
    """
    return (" " if language == "en" else "").join(_sentence(rng, language) for _ in range(sentences))


def _sentence(rng: np.random.Generator, language: str) -> str:
    """One sentence about sizes, places or backgrounds."""
    words = WORDS[language]

    def pick(attribute: str) -> str:
        return str(rng.choice(list(words[attribute].values())))

    small, large = sorted(rng.choice(len(SIZES), size=2, replace=False))
    sizes = list(words["size"].values())
    colour, shape, other, place = pick("colour"), pick("shape"), pick("shape"), pick("position")
    english = (
        f"a {sizes[large]} {shape} is larger than a {sizes[small]} {other}.",
        f"the {shape} is {colour}.",
        f"one object is at the {place}.",
        f"a {shape} is {pick('direction')}.",
        f"one {colour} object is on a {pick('background')}.",
    )
    chinese = (
        f"{sizes[large]}、{shape},比{sizes[small]}、{other},更大。",
        f"{shape},是{colour}。",
        f"物体,在{place}。",
        f"{shape},{pick('direction')},移动。",
        f"{colour}、物体,在{pick('background')}。",
    )
    return (english if language == "en" else chinese)[int(rng.integers(len(english)))]
