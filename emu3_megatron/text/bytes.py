"""The smallest tokenizer: UTF-8 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.text.common import check_ids, fingerprint, replace_surrogates


class ByteTokenizer:
    """Text as its UTF-8 bytes, ids 0..255: needs no file and fits the vocabulary preset ``tiny``."""

    size = 256
    """Number of ids."""
    fingerprint = fingerprint("bytes")
    """SHA-256 (hex) of the rule."""

    def normalize(self, text: str) -> str:
        """`text` with lone surrogates replaced."""
        return replace_surrogates(text)

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(replace_surrogates(text).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """The bytes of each text, uint8."""
        return [np.frombuffer(replace_surrogates(text).encode(), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return bytes(check_ids(ids, self.size)).decode(errors="replace")
