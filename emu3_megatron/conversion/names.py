"""The spelling of every id: the `vocabulary_map` of transformers and the inverse."""

from __future__ import annotations

import re
from collections.abc import Mapping

from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.vocabulary import EMU3_CONTROL_COUNT, Vocabulary

IMAGE_PLACEHOLDER = "<image>"
"""transformers' placeholder for an image in a prompt; it takes the place of ``<|extra_0|>``."""

_EXTRA_COUNT = 205
_EXTRA_NAMES = [IMAGE_PLACEHOLDER] + [f"<|extra_{index}|>" for index in range(1, _EXTRA_COUNT)]

CONTROL_NAMES: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *_EXTRA_NAMES,
    "<|image token|>",
    "<|image start|>",
    "<|image end|>",
)
"""The control block in the order of its ids (github.com/baaivision/Emu3, tokenization_emu3.py)."""

_VISION_NAME = re.compile(r"^<\|visual token (\d{6,})\|>$")


def vision_name(code: int) -> str:
    """``<|visual token 000000|>``: six digits at least."""
    return f"<|visual token {code:06d}|>"


def special_names(vocabulary: Vocabulary) -> dict[str, int]:
    """Names and ids of all control and vision tokens.

    Raises `ConversionError` for a vocabulary without Emu3's control block: transformers finds tokens by name.
    """
    expected = Vocabulary.build(
        vocabulary.name, text_size=vocabulary.text_size, codebook_size=vocabulary.codebook_size
    )
    if vocabulary != expected:
        raise ConversionError(
            f"vocabulary {vocabulary.name!r} does not have Emu3's block of {EMU3_CONTROL_COUNT} control ids "
            f"after {vocabulary.text_size} text ids, which transformers needs; see Vocabulary.build"
        )
    names = {name: vocabulary.text_size + index for index, name in enumerate(CONTROL_NAMES)}
    offset = vocabulary.vision_offset
    names.update({vision_name(code): offset + code for code in range(vocabulary.codebook_size)})
    return names


def vocabulary_map(vocabulary: Vocabulary, text_names: Mapping[str, int] | None = None) -> dict[str, int]:
    """The whole ``vocabulary_map`` of an Emu3 configuration, in the order of ids.

    Args:
        vocabulary: with Emu3's control block.
        text_names: spelling of the text ids; without one they are left out (transformers reads the control
            and vision names only).
    """
    names = dict(text_names or {})
    special = special_names(vocabulary)
    if clash := sorted(set(names) & set(special))[:3]:
        raise ConversionError(f"text pieces are spelled like control tokens: {clash}")
    names.update(special)
    return dict(sorted(names.items(), key=lambda item: item[1]))


def read_vocabulary(names: Mapping[str, int], *, name: str = "imported") -> Vocabulary:
    """The vocabulary that a ``vocabulary_map`` describes.

    Raises `ConversionError` when a token is missing or stands in an unexpected place.
    """
    codes = {}
    for spelling, token in names.items():
        if match := _VISION_NAME.match(spelling):
            codes[int(match.group(1))] = token
    if not codes or sorted(codes) != list(range(len(codes))):
        raise ConversionError(
            f"vocabulary_map holds {len(codes)} visual tokens, which are not numbered 0, 1, 2, ...; "
            "is this an Emu3 configuration?"
        )
    text_size = codes[0] - EMU3_CONTROL_COUNT
    vocabulary = Vocabulary.build(name, text_size=text_size, codebook_size=len(codes))
    for spelling, token in special_names(vocabulary).items():
        if spelling in names and names[spelling] != token:
            raise ConversionError(
                f"vocabulary_map puts {spelling} at {names[spelling]}, Emu3's layout puts it at {token}"
            )
    preset = Vocabulary.preset("emu3")
    same = vocabulary.text_size == preset.text_size and vocabulary.codebook_size == preset.codebook_size
    return preset if same else vocabulary
