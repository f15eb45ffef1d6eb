"""Tokenizers of the Hugging Face ``tokenizers`` library (``tokenizer.json``)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from emu3_megatron.text.common import check_ids, fingerprint, id_array, replace_surrogates, settle

_UNREACHABLE = "\ufdd0"
"""A noncharacter: a piece that begins with it is found in no text."""


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` without its added tokens: only the model's own vocabulary encodes text.

    Added tokens are how such a file turns spellings (``<|im_start|>``) into ids of their own, and its
    post-processor is how it adds them unasked; neither belongs to text here.

    Args:
        path: The ``tokenizer.json``.

    Raises:
        ValueError: if the file is not one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        content = Path(path).read_bytes()
        try:
            description = json.loads(content)
            _remove_added_tokens(description)
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer.json of the tokenizers library: {error}") from error
        self.size: int = max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        """Number of ids: the largest one of the model's own vocabulary, plus one."""
        self.fingerprint = fingerprint("huggingface", content)
        """SHA-256 (hex) of the file."""

    def normalize(self, text: str) -> str:
        """What is left of `text` after encoding and decoding: the file's own rules decide."""
        return settle(self, text)

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        return list(self._tokenizer.encode(replace_surrogates(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """Ids of each text, int32; without the offsets that `encode` finds as well."""
        encode = self._tokenizer.encode_batch_fast  # of one text each: more would start threads of its own
        return [
            id_array(encode([replace_surrogates(text)], add_special_tokens=False)[0].ids) for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        return str(self._tokenizer.decode(check_ids(ids, self.size), skip_special_tokens=False))


def _remove_added_tokens(description: dict[str, Any]) -> None:
    """Leave only what turns plain text into ids of the model's own vocabulary."""
    added = {token["content"] for token in description.get("added_tokens", [])}
    description.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    model = description["model"]
    if model.get("type") == "Unigram":
        # a unigram model finds its pieces by their spelling, those of control tokens too
        model["vocab"] = [[_UNREACHABLE * (piece in added) + piece, score] for piece, score in model["vocab"]]
