"""The meta text of a span: numbers joined by ``*``, between BOI and IMG.

A meta text is spelled one character per token. Under Qwen's tokenizer this is exactly how the whole string is
tokenized (``90*90`` = ``[24, 15, 9, 24, 15]``); under any other tokenizer it keeps the text unambiguous and
lets the automaton state, character by character, what can still become a valid size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from emu3_megatron.grammar.protocol import TextTokenizer
from emu3_megatron.grammar.rules import DialectRules, Field, SpanRule

SEPARATOR = "*"
"""Stands between two numbers."""
POINT = "."
"""Stands before the fraction of a decimal."""
CHARACTERS = "0123456789" + SEPARATOR + POINT
"""Everything a meta text is made of."""
END = ""
"""Stands for "the meta text may end here" among the characters that can follow."""

MAX_DIGITS = 4
"""Digits before the point: sizes go to 9,999 tokens, rates to 9,999 frames a second, durations to 9,999 s."""
MAX_DECIMALS = 3
"""Digits after the point, the last one not 0."""

_COUNT = re.compile(rf"[1-9][0-9]{{0,{MAX_DIGITS - 1}}}")
_FRACTION = rf"\.[0-9]{{0,{MAX_DECIMALS - 1}}}[1-9]"
_DECIMAL = re.compile(rf"{_COUNT.pattern}({_FRACTION})?|0{_FRACTION}")


def write_number(field: Field, value: float) -> str:
    """The canonical spelling of one number.

    Decimals are rounded to three places and lose trailing zeros: 30000/1001 is ``29.97``, 24.0 is ``24``.
    Raises `ValueError` where the value is not positive or does not fit in four digits before the point.
    """
    limit = 10**MAX_DIGITS
    finite = float(value) if math.isfinite(value) else 0.0
    if field.is_decimal:
        rounded = round(finite, MAX_DECIMALS)
        if not 0 < rounded < limit:
            raise ValueError(
                f"{field.value}={value!r} must lie in (0, {limit}) after rounding to {MAX_DECIMALS} decimals"
            )
        return f"{rounded:.{MAX_DECIMALS}f}".rstrip("0").rstrip(POINT)
    if finite != int(finite) or not 0 < finite < limit:
        raise ValueError(f"{field.value}={value!r} must be an integer in [1, {limit - 1}]")
    return str(int(value))


def write_meta(rule: SpanRule, values: Mapping[Field, float | None]) -> str:
    """The meta text of a span: the fields of `rule` in order.

    Raises `ValueError` where a field has no value or one that cannot be written.
    """
    spelled = []
    for field in rule.fields:
        value = values.get(field)
        if value is None:
            raise ValueError(
                f"the meta text of this dialect states {field.value}, which is missing; "
                f"give {field.value}=..., or use a dialect that does not state it"
            )
        spelled.append(write_number(field, value))
    return SEPARATOR.join(spelled)


def read_meta(rules: DialectRules, meta: str) -> tuple[SpanRule, dict[Field, float]]:
    """The rule that a complete and valid meta text follows, and its numbers (integers but for decimals)."""
    spelled = meta.split(SEPARATOR)
    rule = rules.image if rules.video is None or len(spelled) == len(rules.image.fields) else rules.video
    return rule, {
        field: float(number) if field.is_decimal else int(number)
        for field, number in zip(rule.fields, spelled, strict=True)
    }


def _is_number(field: Field, text: str) -> bool:
    """Whether `text` is the one spelling of a value of `field`."""
    return (_DECIMAL if field.is_decimal else _COUNT).fullmatch(text) is not None


def _begins_number(field: Field, text: str) -> bool:
    """Whether `text` can be completed to a number: with nothing, a last digit, or a fraction."""
    return any(_is_number(field, text + rest) for rest in ("", "1", POINT + "1"))


def next_characters(rules: DialectRules, meta: str) -> frozenset[str]:
    """What can follow the beginning `meta` of a meta text; `END` stands for IMG.

    Only characters that can still lead to a complete meta text are given; the empty set means that `meta` is
    no beginning of one.
    """
    *finished, number = meta.split(SEPARATOR)
    following: set[str] = set()
    for rule in (rules.image, rules.video):
        if rule is None or len(finished) >= len(rule.fields):
            continue
        if not all(_is_number(field, text) for field, text in zip(rule.fields, finished, strict=False)):
            continue
        field = rule.fields[len(finished)]
        following |= {c for c in CHARACTERS if c != SEPARATOR and _begins_number(field, number + c)}
        if _is_number(field, number):
            following.add(END if len(finished) + 1 == len(rule.fields) else SEPARATOR)
    return frozenset(following)


def spell_characters(tokenizer: TextTokenizer) -> dict[str, int]:
    """The id of each character of `CHARACTERS`.

    Raises `ValueError` where the tokenizer has no token of its own for one of them.
    """
    spelling: dict[str, int] = {}
    for character in CHARACTERS:
        # the last id: a tokenizer may put a word start first (SentencePiece's dummy prefix)
        ids = tokenizer.encode(character)[-1:]
        if not ids or tokenizer.decode(ids).strip() != character or ids[0] in spelling.values():
            raise ValueError(
                f"the text tokenizer has no token for {character!r} alone, which the meta text of spans "
                f"needs; train it with {CHARACTERS!r} as required characters or with byte fallback"
            )
        spelling[character] = ids[0]
    return spelling
