"""Qwen's byte-level BPE, the text tokenizer of Emu3, from its ranks file.

Emu3's ``emu3.tiktoken`` is Qwen's ``qwen.tiktoken``.
"""

from __future__ import annotations

import base64
import binascii
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from emu3_megatron.text.common import check_ids, fingerprint, id_array, replace_surrogates

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How a text is cut before merging: every digit is a token of its own."""


class QwenTokenizer:
    """NFC, Qwen's pattern, and the merges of a ranks file; ids 0..151,642 with Qwen's own file.

    No special token is registered: ``<|endoftext|>`` or ``<|image start|>`` in a text are ordinary text.

    Args:
        path: Ranks file of tiktoken: a line is the token in base64, a space and its rank.

    Raises:
        ValueError: if the file is not such a file, or lacks one of the 256 bytes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        content = Path(path).read_bytes()
        ranks = _read_ranks(content, path)
        self.size = len(ranks)
        """Number of ids."""
        self.fingerprint = fingerprint("qwen", "NFC", PATTERN, content)
        """SHA-256 (hex) of the file and the rules."""
        self._encoding = tiktoken.Encoding(
            Path(path).stem, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def normalize(self, text: str) -> str:
        """NFC, with lone surrogates replaced."""
        return unicodedata.normalize("NFC", replace_surrogates(text))

    def encode(self, text: str) -> list[int]:
        """Ids of the normalised text."""
        return self._encoding.encode_ordinary(self.normalize(text))

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """Ids of each normalised text, int32."""
        return [id_array(self.encode(text)) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(check_ids(ids, self.size), errors="replace")


def _read_ranks(content: bytes, path: str | os.PathLike[str]) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}: line {number} is not 'BASE64 RANK' of a tiktoken ranks file: {line[:40]!r}"
            ) from error
    missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"{path}: not a whole tiktoken ranks file: {len(ranks)} tokens, {missing} of the 256 bytes "
            "missing, ranks must be 0, 1, 2, ... without a gap"
        )
    return ranks
