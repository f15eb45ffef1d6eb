"""What the grammar asks of a text tokenizer; `emu3_megatron.text` holds the implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class TextTokenizer(Protocol):
    """Text to ids below `size`, and back.

    ``encode`` never looks for special tokens: the spelling of a control token is ordinary text.
    A text is *canonical* when ``decode(encode(text)) == text``; `normalize` gives the canonical form, so
    ``decode(encode(normalize(text))) == normalize(text)``.
    """

    @property
    def size(self) -> int:
        """Number of ids; every id is in ``0 .. size-1``."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the ids of a text."""
        ...

    def normalize(self, text: str) -> str:
        """The canonical form of `text`."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; any string is accepted."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """What `encode` gives for each text, as arrays ``[N]``, by the library's quickest way on one core."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. `ValueError` for an id outside the range."""
        ...
