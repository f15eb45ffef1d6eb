"""What the tokenizers share."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emu3_megatron.grammar.protocol import TextTokenizer

_ROUNDS = 8
"""Encodings after which a text that still changes is taken as it is."""


def replace_surrogates(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD, and pairs joined."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def check_ids(ids: Sequence[int], size: int) -> list[int]:
    """`ids` as plain integers. Raises `ValueError` for one outside ``0 .. size-1``."""
    plain = [int(token) for token in ids]
    for token in plain:
        if not 0 <= token < size:
            raise ValueError(
                f"{token} is not a text id: they lie in [0, {size}); control and vision tokens have no text"
            )
    return plain


def id_array(ids: Sequence[int]) -> npt.NDArray[np.int32]:
    """`ids` as an array, in a third of NumPy's own time."""
    return np.frombuffer(array("i", ids), np.int32)


def fingerprint(*parts: bytes | str) -> str:
    """SHA-256 (hex) of `parts` and their boundaries."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def settle(tokenizer: TextTokenizer, text: str) -> str:
    """`text` encoded and decoded until it no longer changes.

    Once is enough but for models that spell unknown characters with a sign and spaces around it.
    """
    for _ in range(_ROUNDS):
        settled = tokenizer.decode(tokenizer.encode(text))
        if settled == text:
            break
        text = settled
    return text
